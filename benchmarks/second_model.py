"""Quality of schemes on a second or third language model, which is trained here; resumable.

    python benchmarks/second_model.py [--model mixture] --out docs/benchmarks

The second is a GPT-2 of 4 blocks and 1.1 M parameters, with what a Llama lacks: Conv1D layers, q, k
and v in one matrix, learned positions, LayerNorm, biases, a feed-forward without a gate. The third
is the Mixtral of `mixture_model.py`. Both learn from the text that Python ships, as
`python_models.py` says. `quality.py` measures them on pieces of documents that they were not
trained on, with three draws of the calibration data, as a ratio to dense.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import python_models
import quality
import torch
from mixture_model import trained_mixture
from python_models import BATCH, LOSS, VOCABULARY, WINDOW, trained
from timing import write
from transformers import GPT2Config, GPT2LMHeadModel

SCHEMES = ["auto", "svd-llm", "modegpt", "asvd", "fwsvd", "svd"]
STEPS = 2000
TEXT = "held-out text"


def main() -> None:
    """Train if need be, measure what is missing, and write the table."""
    asked = _arguments()
    made = MODELS[asked.model]
    model, tokenizer, folder = made.trained(asked.steps or made.steps)
    losses = json.loads((folder / LOSS).read_text())
    figures = {
        "parameters": model.num_parameters(),
        "steps": len(losses),
        "trained_tokens": len(losses) * BATCH * WINDOW,
        "training_loss": sum(losses[-50:]) / len(losses[-50:]),
        "predictions": asked.windows * (WINDOW - 1),
        "unigram": unigram(tokenizer, folder),
    }
    rows = measure(folder, asked)
    write(asked.out, made.name, {**figures, "rows": rows}, as_text(figures, rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--scheme", nargs="+", default=SCHEMES)
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=128, help="of 256 tokens, to measure on")
    parser.add_argument("--num-samples", type=int, default=128, help="windows of calibration")
    parser.add_argument(
        "--gradient-samples", type=int, default=64, help="windows used for gradients"
    )
    parser.add_argument("--steps", type=int, help="of training; the model's own if not given")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def make_model(seed: int = 0) -> GPT2LMHeadModel:
    """Draw an untrained model."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=128,
        n_layer=4,
        n_head=4,
        n_positions=WINDOW,
        activation_function="gelu_pytorch_tanh",  # as gelu_new, in one kernel
        embd_pdrop=0.0,  # so that training may stop and go on
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def trained_gpt2(steps: int) -> tuple[Any, Any, Path]:
    """Return the model, its tokenizer, and their folder, in the user's cache of tnlm."""
    return trained("gpt2", make_model, steps)


class Trained(NamedTuple):
    """A model that is trained here."""

    name: str
    """Of the files that are written."""
    trained: Callable[[int], tuple[Any, Any, Path]]
    """Trains for so many steps."""
    steps: int


MODELS = {
    "gpt2": Trained("second_model", trained_gpt2, STEPS),
    "mixture": Trained("third_model", trained_mixture, python_models.STEPS),
}


def measure(folder: Path, asked: argparse.Namespace) -> list[dict[str, Any]]:
    """Let `quality.py` measure what is missing, beside the model; return the rows asked for."""
    sizes = ("windows", "num_samples", "gradient_samples")
    out = folder / "-".join(["quality", *(str(getattr(asked, name)) for name in sizes)])
    words = [str(folder), str(out), "--together", "--table", "readme", "--window", str(WINDOW)]
    words += ["--calibration", str(folder / "training.jsonl")]
    words += ["--text", f"{TEXT}={folder / 'held_out.jsonl'}"]
    for name in (*sizes, "scheme", "keep_targets", "seeds"):
        given = getattr(asked, name)
        words.append("--" + name.replace("_", "-"))
        words += map(str, given if isinstance(given, list) else [given])
    return quality.main(words)


def unigram(tokenizer: Any, folder: Path) -> float:
    """Return the held-out perplexity of the tokens' frequencies in training, plus one each."""
    parts = []
    for name in ("training", "held_out"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        ids = tokenizer([json.loads(line)["text"] for line in lines])["input_ids"]
        parts.append(Counter(token for row in ids for token in row))
    known, held = parts
    total = known.total() + len(tokenizer)
    logs = {token: torch.tensor((known[token] + 1) / total).log() for token in held}
    mean = sum(count * logs[token] for token, count in held.items()) / held.total()
    return float((-mean).exp())


def as_text(figures: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Return the figures in words, and the table."""
    return (
        f"{figures['parameters']:,} parameters; {figures['steps']} steps, "
        f"{figures['trained_tokens']:,} tokens. Training loss over the last 50 steps "
        f"{figures['training_loss']:.3f}; held-out perplexity over {figures['predictions']:,} "
        f"predictions {rows[0][TEXT]:.2f}, where the tokens' frequencies alone have "
        f"{figures['unigram']:.0f}.\n\n{quality.ratios(rows)}"
    )


if __name__ == "__main__":
    main()
