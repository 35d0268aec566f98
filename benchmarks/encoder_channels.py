"""Compare `auto` on a classifier with and without fewer feed-forward channels.

    python benchmarks/encoder_channels.py MODEL TRAIN.jsonl DEV.jsonl --text sentence --keep 0.6 0.5

MODEL is a directory with a classifier, such as the one that classifier.py makes. Prints the share
of the blocks' parameters that is left, the accuracy, and how often the class is the dense model's.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from classification import Row
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tnlm

FORMATS = {"with channels": ("low-rank", "channels"), "without": ("low-rank",)}


def main() -> None:
    """Measure all."""
    asked = _arguments()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    columns = {"text": asked.text, "label": asked.label, "max_length": asked.max_length}
    train, dev = (tnlm.labelled(path, tokenizer, **columns) for path in (asked.train, asked.dev))
    labels = torch.tensor([row["labels"] for row in dev])
    dense = AutoModelForSequenceClassification.from_pretrained(asked.model).eval()
    expected = classes(dense, dev)
    print(f"dense: accuracy {share(expected, labels):.1f} %")
    for keep in asked.keep:
        for name, formats in FORMATS.items():
            model = AutoModelForSequenceClassification.from_pretrained(asked.model).eval()
            tnlm.compress(
                model,
                tnlm.scheme("auto", formats=formats),
                keep_targets=keep,
                calibration=train[: asked.samples],
                tokenizer=tokenizer,
                num_samples=asked.samples,
                gradient_samples=asked.samples,
                progress=False,
            )
            found, plan = classes(model, dev), tnlm.report(model).plan
            left = plan.targets_after.params / plan.targets_before.params
            narrowed = sum(layer.format == "channels" for layer in plan.layers)
            print(
                f"keep {keep}, {name}: {left:.3f} left, {narrowed} layers narrowed, accuracy "
                f"{share(found, labels):.1f} %, as dense {share(found, expected):.1f} %",
                flush=True,
            )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.6, 0.5])
    parser.add_argument("--samples", type=int, default=128, help="sentences of calibration")
    parser.add_argument("--text", default="text")
    parser.add_argument("--label", default="label")
    parser.add_argument("--max-length", type=int, default=64)
    return parser.parse_args()


@torch.no_grad()
def classes(model: Any, rows: list[Row]) -> torch.Tensor:
    """Return the likeliest class of every row."""
    ids = (torch.tensor(row["input_ids"])[None] for row in rows)
    return torch.cat([model(input_ids=each).logits.argmax(-1) for each in ids])


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how often classes agree, in per cent.

    Example:
        >>> share(torch.tensor([0, 1]), torch.tensor([1, 1]))
        50.0
    """
    return 100 * float((found == expected).double().mean())


if __name__ == "__main__":
    main()
