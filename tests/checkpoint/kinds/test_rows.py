"""Modules that lost rows: what a checkpoint may say of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.checkpoint.entries import build, check_entry
from tnlm.errors import CheckpointError

ENTRY = {"kind": "rows", "rows": 8, "kept": [1, 6], "tensors": ["weight", "bias"]}


def test_it_is_built_of_the_module_that_has_the_rows():
    router = nn.Linear(4, 8)
    made = build(ENTRY, old=router)
    assert torch.equal(made.weight, router.weight[[1, 6]])
    assert torch.equal(made.bias, router.bias[[1, 6]])
    assert build(ENTRY, old=made) is made


@pytest.mark.parametrize(
    "change",
    [
        {"kept": []},
        {"kept": [6, 1]},
        {"kept": [1, 1]},
        {"kept": [1, 8]},
        {"kept": [-1, 1]},
        {"kept": [1.0]},
        {"kept": None},
        {"rows": 9, "kept": [8]},
        {"tensors": ["wight"]},
    ],
)
def test_what_does_not_fit_is_refused(change):
    check_entry("gate", ENTRY, nn.Linear(4, 8))
    with pytest.raises(CheckpointError, match="gate"):
        check_entry("gate", ENTRY | change, nn.Linear(4, 8))


def test_it_cannot_be_built_of_nothing():
    with pytest.raises(CheckpointError, match="none was given"):
        build(ENTRY)
