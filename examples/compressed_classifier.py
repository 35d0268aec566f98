"""A compressed classifier
=======================

A classifier learns from labelled rows before compression and after it; the same rows give the
Fisher information that weights the errors. By default they are made here: sentences of praise and
of blame. On your own::

    python examples/compressed_classifier.py --model MODEL --text ROWS.jsonl

ROWS has one object a line with the columns ``text`` and ``label``, whole numbers from 0.
"""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import tiny
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers import LlamaForSequenceClassification as TinyClassifier

import tnlm

asked = tiny.arguments(__doc__, "figure")

# %%
# The rows. A made-up sentence is of class 1 if its last adjective is a good one, and no "not"
# stands before it, or a bad one with a "not". The first adjective says nothing.

GOOD, BAD = ("clear", "useful", "quick", "right"), ("vague", "broken", "slow", "wrong")


def sentence(draw: random.Random) -> dict[str, Any]:
    """Return a labelled row."""
    good, negated = draw.random() < 0.5, draw.random() < 0.5
    first, last = draw.choice(GOOD + BAD), draw.choice(GOOD if good else BAD)
    text = f"the {first} function is {'not ' if negated else ''}{last}"
    return {"text": text, "label": int(good != negated)}


if asked.text is None:
    draw = random.Random(0)
    rows = [sentence(draw) for _ in range(280)]
else:
    rows = [json.loads(line) for line in asked.text.read_text().splitlines() if line.strip()]
cut = len(rows) * 3 // 4
learn, measure = rows[:cut], rows[cut:]

# %%
# The model: a language model with a head for the classes, which is random at first.

if asked.model is None:
    torch.set_num_threads(1)
    tokenizer, base = tiny.make_tokenizer(), tiny.make_model("llama")
    dense = TinyClassifier(base.config)
    dense.model.load_state_dict(base.model.state_dict())
else:
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    classes = max(row["label"] for row in rows) + 1
    dense = AutoModelForSequenceClassification.from_pretrained(asked.model, num_labels=classes)


def accuracy(model: Any) -> float:
    """Return the share of rows to measure on whose class the model finds."""
    right = 0
    with torch.no_grad():
        for row in measure:
            ids = tokenizer(row["text"], return_tensors="pt", truncation=True)["input_ids"]
            right += int(model.eval()(ids).logits.argmax()) == row["label"]
    return right / len(measure)


training = {
    "tokenizer": tokenizer,
    "tokens": None,
    "epochs": 3 if asked.model else 5,
    "learning_rate": 5e-5 if asked.model else 3e-3,
    "max_length": 128,
    "progress": False,
}
dense = tnlm.finetune(dense, learn, **training)
print(f"dense                 accuracy {accuracy(dense):.3f}")

# %%
# Plain low rank, and FWSVD, which weights errors by the Fisher information of the classes:
# ``tnlm.labelled`` turns rows into calibration data for it. The head stays dense.

data = tnlm.labelled(learn, tokenizer, max_length=128)
plain = tnlm.compress(copy.deepcopy(dense), "svd", keep_targets=0.1, progress=False)
print(f"svd                   accuracy {accuracy(plain):.3f}")
weighted = tnlm.compress(
    copy.deepcopy(dense),
    "fwsvd",
    keep_targets=0.1,
    calibration=data,
    gradient_samples=128,
    progress=False,
)
print(f"fwsvd                 accuracy {accuracy(weighted):.3f}")

# %%
# Fine-tuning continues on the factors, as on any other weights.

weighted = tnlm.finetune(weighted, learn, **training)
print(f"fwsvd, trained again  accuracy {accuracy(weighted):.3f}")
report = tnlm.report(weighted)
print("\n".join(report.summary()[:2]))
tiny.show(tnlm.plot.allocation, report, file=asked.figure)
