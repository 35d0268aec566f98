"""Kinds of entries: one file each, and whatever another file adds is checked, built and read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.checkpoint.entries import build, check_entry, dense_module
from tnlm.checkpoint.kinds import KINDS
from tnlm.checkpoint.kinds.base import EntryKind
from tnlm.errors import CheckpointError


class Doubling(EntryKind):
    """Says that a linear layer is another one, twice."""

    name = "doubling"

    def check(self, entry, module):
        """Check the size."""
        if entry["size"] != module.in_features:
            raise CheckpointError(f"size={entry['size']}; the model has {module.in_features}")

    def build(self, entry, place):
        """Return the halved layer."""
        return nn.Linear(entry["size"], entry["size"], **place.tensors)

    def dense(self, entry, module):
        """Return the whole layer."""
        dense = nn.Linear(entry["size"], entry["size"], bias=False)
        dense.weight.data = 2 * module.weight.detach()
        return dense


@pytest.fixture
def doubling():
    KINDS.add(Doubling())
    yield {"kind": "doubling", "size": 3}
    KINDS.remove("doubling")


def test_the_kinds_of_earlier_checkpoints_are_there():
    assert set(KINDS.all()) >= {"linear", "dense", "sliced", "fused", "embedding", "head"}


def test_a_kind_that_was_added_is_used(doubling):
    check_entry("layer", doubling, nn.Linear(3, 3))
    made = build(doubling)
    assert torch.equal(dense_module(doubling, made).weight, 2 * made.weight)


def test_its_errors_name_the_layer(doubling):
    with pytest.raises(CheckpointError, match=r"does not fit the model at h\.0: size=3; .*has 4"):
        check_entry("h.0", doubling, nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match=r"broken entry for h\.0: KeyError\('size'\)"):
        check_entry("h.0", {"kind": "doubling"}, nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["tripling", 3, None, ["linear"]])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(CheckpointError, match=r"h\.0: unknown kind of entry .*Allowed: dense"):
        check_entry("h.0", {"kind": kind}, nn.Linear(4, 4))


@pytest.mark.parametrize("kind", ["embedding", "head", "fused"])
def test_what_is_no_matrix_of_a_linear_layer_is_no_part(kind):
    part = {"name": "a", "kind": kind, "shape": [4, 4], "bias": False, "parts": []}
    with pytest.raises(CheckpointError, match="cannot be one of several parts"):
        check_entry("h.0", {"kind": "fused", "parts": [part]}, nn.Linear(4, 4, bias=False))
