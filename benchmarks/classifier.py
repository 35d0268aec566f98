"""Make the classifier that the other benchmarks start from: a small encoder, fine-tuned.

    python benchmarks/classifier.py ENCODER TRAIN.jsonl DEV.jsonl OUT --text sentence

All parameters are trained for two epochs: batches of 32, AdamW at 5e-5 with 40 steps of warm-up and
a linear decay. ``--freeze embeddings encoder --rate 1e-3 --epochs 1`` trains the pooler and the
head alone, in less time. It is a loop of its own, so that what it makes does not change with
`tnlm.finetune`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from classification import accuracy
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tnlm
from tnlm.calibration.rows import read_rows

EPOCHS, BATCH, RATE, DECAY, WARMUP = 2, 32, 5e-5, 0.01, 40


def main() -> None:
    """Train, save, and say how good it is."""
    asked = _arguments()
    torch.manual_seed(0)  # draws the head, the dropout and the order of the sentences
    tokenizer = AutoTokenizer.from_pretrained(asked.encoder)
    train = read_rows(asked.train)
    model = AutoModelForSequenceClassification.from_pretrained(
        asked.encoder, num_labels=len({row[asked.label] for row in train})
    )
    texts, labels = ([row[column] for row in train] for column in (asked.text, asked.label))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in asked.freeze))
    fit(model, tokenizer, texts, torch.tensor(labels), asked)
    columns = {"text": asked.text, "label": asked.label, "max_length": asked.max_length}
    dev = tnlm.labelled(asked.dev, tokenizer, **columns)
    print(f"accuracy {100 * accuracy(model.eval(), dev, tokenizer.pad_token_id):.1f} %")
    model.save_pretrained(asked.out)
    tokenizer.save_pretrained(asked.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder")
    parser.add_argument("train", type=Path)
    parser.add_argument("dev", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", default="text", help="column of the sentences")
    parser.add_argument("--label", default="label")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument(
        "--freeze", nargs="*", default=[], help="substrings of the names of parameters to freeze"
    )
    return parser.parse_args()


def fit(
    model: Any, tokenizer: Any, texts: list[str], labels: torch.Tensor, asked: argparse.Namespace
) -> None:
    """Train a model in place on all texts but those that fill no batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=asked.rate, weight_decay=DECAY)
    starts = range(0, len(texts) - BATCH + 1, BATCH)
    steps = asked.epochs * len(starts)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    model.train()
    with tqdm(total=steps) as bar:
        for _ in range(asked.epochs):
            order = torch.randperm(len(texts))
            for start in starts:
                some = order[start : start + BATCH]
                words = tokenizer(
                    [texts[i] for i in some.tolist()],
                    padding=True,
                    truncation=True,
                    max_length=asked.max_length,
                    return_tensors="pt",
                )
                model(**words, labels=labels[some]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                bar.update()


if __name__ == "__main__":
    main()
