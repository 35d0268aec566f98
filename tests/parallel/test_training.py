"""Several processes train on a share of the data each, as one does on larger batches."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm
from tests.parallel.conftest import run_in_processes
from tnlm.parallel.workers import ALONE
from tnlm.recovery.sharing import average, in_steps

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are started as on Linux")
NEAR = {"rtol": 1e-4, "atol": 1e-5}
"""Sums of gradients differ in their last bits, which Adam may enlarge."""


def make():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def batches(size):
    """Return 4 sequences in batches of a size; half of the labels of the second are ignored."""
    ids = torch.arange(64).mul(7).remainder(61).reshape(4, 16)
    labels = ids.clone()
    labels[1, 8:] = -100
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    parts = [{key: value[at : at + size] for key, value in whole.items()} for at in range(4)]
    return parts[::size]


def healed(size, **options):
    model = tnlm.compress(make(), "svd", keep_targets=0.6, progress=False)
    options = {"rank": 2, "tokens": 6 * 64, "learning_rate": 1e-2, **options}
    tnlm.heal(model, batches(size), progress=False, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def pruned(size, **options):
    options = {"keep": 0.5, "rank": 2, "every": 1, "learning_rate": 1e-3, **options}
    model = tnlm.prune(make(), batches(size), progress=False, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("train", [healed, pruned])
def test_two_processes_train_as_one_does_on_doubled_batches(train, tmp_path):
    expected = train(4)
    first, second = run_in_processes(tmp_path, 2, train, 2)
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        assert first[name].shape == tensor.shape
        assert torch.allclose(first[name], tensor, **NEAR), name
    idle = train(4, learning_rate=1e-12)
    assert not all(torch.allclose(idle[name], each, **NEAR) for name, each in expected.items())


def other_data(train):
    given = batches(2)
    given[0]["input_ids"] += int(os.environ["RANK"])
    options = {"rank": 2, "progress": False}
    if train == "heal":
        model = tnlm.compress(make(), "svd", keep_targets=0.6, progress=False)
        return tnlm.heal(model, given, tokens=64, **options)
    return tnlm.prune(make(), given, **options)


@pytest.mark.parametrize("train", ["heal", "prune"])
def test_processes_with_other_data_are_refused(train, tmp_path):
    for words in run_in_processes(tmp_path, 2, other_data, train):
        assert words.startswith("ProcessError: process 1 of 2 has data ")


@pytest.mark.slow
def test_three_processes_share_what_is_left(tmp_path):
    found = run_in_processes(tmp_path, 3, healed, 1)
    assert all(torch.equal(one[name], tensor) for one in found for name, tensor in found[0].items())


class Two:
    """The first of two processes; the other has no gradient, and twice the predictions."""

    size, rank = 2, 0

    def __init__(self, other):
        self.other = other

    def add_up(self, total):
        total += self.other.to(total)

    def mine(self, items):
        return items[self.rank :: self.size]


def test_gradients_count_by_their_predictions():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 6.0])
    assert average([parameter], 2, Two(torch.tensor([4.0, 0.0, 0.0])))
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert not average([parameter], 0, Two(torch.zeros(3)))
    assert average([parameter], 2, ALONE)
    assert not average([parameter], 0, ALONE)
    assert in_steps([5, 6, 7], Two(None)) == [5, 7]
    second = Two(None)
    second.rank = 1
    assert in_steps([5, 6, 7], second) == [6, None]
