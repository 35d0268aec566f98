"""What is trained in these tests."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification

import tnlm
from tnlm.recovery.examples import batches
from tnlm.recovery.model_kinds import examples_for


@pytest.fixture(scope="session")
def classifier(tiny_bert):
    """Make a BERT that tells three classes apart, without dropout."""

    def make(**config: Any) -> BertForSequenceClassification:
        quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        made = tiny_bert(**(quiet | config)).config
        torch.manual_seed(0)
        return BertForSequenceClassification(made).eval()

    return make


@pytest.fixture(scope="session")
def model_of(make_model, compressed, classifier):
    """Make a model of some kind, as it is or compressed."""

    @functools.cache
    def small(scheme: str) -> BertForSequenceClassification:
        return tnlm.compress(classifier(), scheme)

    def make(kind: str, scheme: str | None = None):
        if kind == "classifier":
            return classifier() if scheme is None else copy.deepcopy(small(scheme))
        return make_model(kind) if scheme is None else compressed(kind, scheme)

    return make


@pytest.fixture(scope="session")
def data_of(word_tokenizer):
    """Make data for a model of some kind, easy to learn, and its arguments."""
    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.mask_token = "word60"

    def make(kind: str) -> dict[str, Any]:
        if kind == "classifier":
            rows = [{"input_ids": [3 + i % 3] * (4 + i % 5), "label": i % 3} for i in range(32)]
            return {"data": rows, "max_length": 16}
        ids = torch.arange(16 * 16) % 8 + 3
        return {"data": ids, "tokenizer": tokenizer, "max_length": 16}

    return make


@pytest.fixture(scope="session")
def lose_the_loss():
    """Make a model's logits NaN from some forward pass on.

    A huge learning rate does not do it for certain: norms make zeros of infinities, and some
    kernels of attention make zeros of NaN, so that the loss may stay finite for a while.
    """

    def lose(model, after: int) -> None:
        passes = itertools.count()

        def spoil(_module, _given, logits):
            return logits if next(passes) < after else logits * float("nan")

        model.get_output_embeddings().register_forward_hook(spoil)

    return lose


@pytest.fixture(scope="session")
def loss_of():
    """Return a model's own loss on data, as `data_of` gives it."""

    def measure(model, given: dict[str, Any]) -> float:
        examples = examples_for(model, **given)
        (batch,) = batches(examples, len(examples))
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    return measure
