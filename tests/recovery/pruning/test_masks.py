from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.recovery.pruning.groups import Cut, Groups
from tnlm.recovery.pruning.masks import Masks
from tnlm.targets.trial import Slabs

BLOCKS = [Groups("heads", f"{i}", 3, (), Cut(f"{i}.read", 1, Slabs(2))) for i in range(2)]


def test_average_is_exponential():
    masks = Masks(BLOCKS[:1], decay=0.75)
    steps = torch.rand(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.zeros(3, dtype=torch.float64)
    for step in steps:
        masks.see(lambda _, step=step: step)
        wanted = 0.75 * wanted + 0.25 * step
    torch.testing.assert_close(masks._scores[BLOCKS[0]], wanted)


def test_each_block_loses_its_own_least_and_for_good():
    masks = Masks(BLOCKS, decay=0.0)
    masks.see(lambda g: torch.tensor([1.0, 2, 3] if g is BLOCKS[0] else [6.0, 5, 4]))
    masks.shrink({"heads": 2.4})
    assert [index.tolist() for index in masks.kept().values()] == [[1, 2], [0, 1]]
    masks.see(lambda _: torch.tensor([9.0, 8, 7]))
    masks.shrink({"heads": 2.0})
    assert [index.tolist() for index in masks.kept().values()] == [[1, 2], [0, 1]]
    masks.shrink({"heads": 1.0})
    assert [index.tolist() for index in masks.kept().values()] == [[1], [0]]


def test_masked_inputs_are_zero_while_applied():
    model = nn.ModuleDict({"0": nn.ModuleDict({"read": nn.Linear(6, 1, bias=False)})})
    reader = model["0"]["read"]
    nn.init.ones_(reader.weight)
    masks = Masks(BLOCKS[:1], decay=0.0)
    masks.see(lambda _: torch.tensor([1.0, 0.0, 2.0]))
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    with masks.applied(model):
        assert float(reader(x).detach()) == 63
        masks.shrink({"heads": 2})
        assert float(reader(x).detach()) == 51
    assert float(reader(x).detach()) == 63
    with pytest.raises(KeyboardInterrupt), masks.applied(model):
        raise KeyboardInterrupt
    assert not reader._forward_pre_hooks
