"""Compress a model with and without data, and compare what each costs.

    python examples/first_compression.py MODEL TEXT

MODEL is a directory, a .gguf file or a hub id; TEXT a file of at least 20,000 words: its first half
calibrates, its second half measures.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import tnlm
from tnlm.integrations.models import load_model


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--keep-targets", type=float, default=0.8)
    parser.add_argument("--window", type=int, default=512)
    asked = parser.parse_args()

    dense, tokenizer = load_model(asked.model)
    text = asked.text.read_text()
    learn, measure = text[: len(text) // 2], text[len(text) // 2 :]

    def show(name: str, model: object) -> None:
        found = tnlm.perplexity(model, measure, tokenizer, window=asked.window, windows=8)
        print(f"{name:10} perplexity {found.perplexity:.2f}")

    show("dense", dense)
    plain = tnlm.compress(copy.deepcopy(dense), "svd", keep_targets=asked.keep_targets)
    show("svd", plain)
    aware = tnlm.compress(
        dense,
        "svd-llm",
        keep_targets=asked.keep_targets,
        calibration=[learn],
        tokenizer=tokenizer,
        num_samples=16,
        max_length=asked.window,
    )
    show("svd-llm", aware)
    print("\n".join(tnlm.report(aware).summary()))


if __name__ == "__main__":
    main()
