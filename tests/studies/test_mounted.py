from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.layers.fused import FusedLinear
from tnlm.studies.mounted import mounting
from tnlm.targets.selection import select


@pytest.fixture
def model(tiny_gpt2):
    return tiny_gpt2(n_layer=1)


@pytest.fixture
def parts(model):
    """The three matrices of a fused projection."""
    return select(model, ["c_attn"]).targets


def mounted_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, FusedLinear)]


def test_the_other_parts_of_a_fused_module_keep_their_values(model, parts):
    own, x = model.get_submodule(parts[0].module), torch.randn(2, 3, 32)
    wanted = own(x)
    with mounting(model, parts) as mounted:
        mounted.put({parts[1].name: nn.Linear(32, 32, bias=False).requires_grad_(False)})
        found = model.get_submodule(parts[0].module)(x)
        assert torch.allclose(found[..., :32], wanted[..., :32], atol=1e-6)
        assert torch.allclose(found[..., 64:], wanted[..., 64:], atol=1e-6)
        assert not torch.allclose(found[..., 32:64], wanted[..., 32:64], atol=1e-6)
        mounted.drop(parts[1].name)
        assert model.get_submodule(parts[0].module) is own
    assert model.get_submodule(parts[0].module) is own


def test_a_replacement_is_as_trainable_as_what_it_replaces(model, parts):
    for trainable in (True, False):
        model.requires_grad_(trainable).train(trainable)
        with mounting(model, parts) as mounted:
            mounted.put({parts[0].name: nn.Linear(32, 32)})
            new = model.get_submodule(parts[0].module)
            assert all(p.requires_grad is trainable for p in new.parameters())
            assert new.training is trainable


def test_a_bare_module_is_the_model_s_own_until_the_next_change(model, parts):
    own = model.get_submodule(parts[0].module)
    with mounting(model, parts) as mounted:
        mounted.put({parts[0].name: nn.Linear(32, 32)})
        mounted.bare(parts[1].name)
        assert model.get_submodule(parts[0].module) is own
        mounted.put({parts[1].name: nn.Linear(32, 32)})
        assert mounted_names(model) == [parts[0].module]


def test_the_model_is_restored_when_a_trial_fails(model, parts):
    own = model.get_submodule(parts[0].module)

    def fails():
        with mounting(model, parts) as mounted:
            mounted.put({parts[0].name: nn.Linear(32, 32)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert model.get_submodule(parts[0].module) is own
