"""Compress a GPT-2 as KnGPT2 does, and let it learn from the original what was lost.

    python examples/kngpt2.py MODEL TEXT

Every second block and the embedding become single Kronecker products, half as large; then the
compressed model learns its teacher's embeddings, attention maps and feed-forward outputs beside
the labels (intermediate-layer distillation; Edalati et al. 2022, arXiv 2110.08152). MODEL is a
directory or a hub id of a GPT-2-like model; TEXT a file whose first 90 % trains and whose rest
measures.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import tnlm
from tnlm.integrations.models import load_model


def main() -> None:
    """Compress, distill and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="trained on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--save", type=Path, help="a new directory for the result")
    asked = parser.parse_args()

    teacher, tokenizer = load_model(asked.model)
    text = asked.text.read_text()
    learn, measure = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]

    def show(name: str, model: object) -> None:
        found = tnlm.perplexity(model, measure, tokenizer, window=asked.window, windows=8)
        print(f"{name:10} perplexity {found.perplexity:.2f}")

    show("teacher", teacher)
    student = tnlm.compress(copy.deepcopy(teacher), "kngpt2")
    print("\n".join(tnlm.report(student).summary()))
    show("compressed", student)
    tnlm.distill(student, teacher, [learn], preset="ilkd", tokens=asked.tokens, tokenizer=tokenizer)
    show("distilled", student)
    if asked.save:
        tnlm.save(student, asked.save, tokenizer=tokenizer)


if __name__ == "__main__":
    main()
