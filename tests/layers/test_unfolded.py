"""Unfolded experts: the same outputs from linear layers that share the 3-D parameters."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)

from tests.mixtures import IDS, KINDS, make
from tnlm.layers.expert_layout import ExpertLayout, layout_of
from tnlm.layers.unfolded import UnfoldedExperts, refold, unfold, unfolded

every_kind = pytest.mark.parametrize("kind", KINDS)


def alone(kind):
    """Return a module of experts of a layout that no family above has."""
    config = transformers.PreTrainedConfig(
        hidden_size=8,
        intermediate_size=6,
        moe_intermediate_size=6,
        moe_hidden_size=8,
        moe_latent_size=None,
        hidden_act="silu",
        mlp_hidden_act="relu2",
        post_norm_eps=1e-6,
        swiglu_alpha=1.7,
        swiglu_limit=7.0,
        num_experts=3,
        n_routed_experts=3,
        moe_num_experts=3,
        num_local_experts=3,
    )
    config._experts_implementation = "eager"
    module = kind(config)
    torch.manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.ModuleDict({"experts": module})


ALONE = [AriaExperts, MuseSparkExperts, NemotronHExperts, OpenAIPrivacyFilterExperts]


@every_kind
def test_outputs_are_the_same(kind):
    model = make(kind)
    dense = model(IDS).logits
    names, parameters = dict(model.named_modules()), list(model.parameters())
    assert unfold(model) == {}
    if kind == "GptOss":  # a bias is added with the product, and not after it
        torch.testing.assert_close(model(IDS).logits, dense, rtol=0, atol=1e-6)
    else:
        assert torch.equal(model(IDS).logits, dense)
    matrices = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    assert matrices == sum(p.numel() for p in parameters)
    refold(model)
    assert dict(model.named_modules()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("kind", ALONE)
def test_other_layouts_are_the_same(kind):
    model = alone(kind)
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    index = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0], [2, 1], [0, 1]])
    dense = model["experts"](x, index, weights)
    assert unfold(model) == {}
    torch.testing.assert_close(model["experts"](x, index, weights), dense)


@every_kind
def test_matrices_are_views(kind):
    model = make(kind)
    layout = layout_of(next(m for m in model.modules() if layout_of(m)))
    original = next(m for m in model.modules() if layout_of(m))
    unfold(model)
    _, module = next(unfolded(model))
    assert len(module) == layout.experts
    with torch.no_grad():
        for name, shape in layout.shapes.items():
            matrix = getattr(module[2], name)
            assert matrix.weight.shape == shape
            matrix.weight.fill_(2.5)
            assert bool((layout.weight(original, name)[2] == 2.5).all())
            assert not bool((layout.weight(original, name)[1] == 2.5).any())


@every_kind
def test_parameters_are_put_together_bit_for_bit(kind):
    module = next(m for m in make(kind).modules() if layout_of(m))
    layout = layout_of(module)
    weights = {name: layout.weight(module, name).clone() for name in layout.shapes}
    biases = {n: layout.bias(module, n).clone() for n in layout.shapes} if layout.biased else {}
    for name, found in layout.stacked(weights, biases).items():
        assert torch.equal(found, getattr(module, name))
        assert found.is_contiguous()


def test_a_copy_shares_the_original_and_nothing_else():
    model = make("GptOss")
    unfold(model)
    twin = copy.deepcopy(model)
    one, other = next(unfolded(model))[1], next(unfolded(twin))[1]
    assert one.original.module is other.original.module
    assert one[0].up_proj.weight is not other[0].up_proj.weight
    assert torch.equal(model(IDS).logits, twin(IDS).logits)


def test_tokens_of_no_expert_are_left_out():
    model = alone(NemotronHExperts)
    unfold(model)
    experts = model["experts"]
    x, weights = torch.randn(2, 8), torch.ones(2, 2)
    found = experts(x, torch.tensor([[0, 3], [3, 3]]), weights)
    torch.testing.assert_close(found[0], experts[0](x[:1])[0])
    assert not bool(found[1].any())


class Shifted(NemotronHExperts):
    """Does more than its experts."""

    def forward(self, *args):
        """Add 1."""
        return super().forward(*args) + 1


class Odd(nn.Module):
    """Holds three matrices in one parameter, and says nothing of them."""

    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 5))


def test_what_does_more_is_left_with_the_reason():
    model = alone(Shifted)
    assert unfold(model) == {"experts": "Shifted does more than its experts one by one"}
    assert isinstance(model["experts"], Shifted)


def test_other_modules_have_no_layout():
    assert layout_of(nn.Linear(3, 4)) is None
    assert layout_of(Odd()) == "Odd is not laid out as transformers' experts are"
    assert isinstance(layout_of(alone(AriaExperts)["experts"]), ExpertLayout)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"down_proj": nn.Parameter(torch.zeros(2, 8, 6))}, "holds matrices of"),
        ({"gate_up_proj": nn.Parameter(torch.zeros(3, 8, 13))}, "holds matrices of"),
        ({"more": nn.Parameter(torch.zeros(3, 8, 6))}, "has the 3-D parameters"),
        ({"scale": nn.Parameter(torch.zeros(3))}, "has the parameters"),
    ],
)
def test_what_does_not_fit_together_has_no_layout(change, reason):
    module = alone(AriaExperts)["experts"]
    for name, parameter in change.items():
        setattr(module, name, parameter)
    assert reason in layout_of(module)


def test_an_unfolded_module_is_a_list_of_experts():
    model = alone(MuseSparkExperts)
    unfold(model)
    experts = model["experts"]
    assert isinstance(experts, UnfoldedExperts)
    assert len(experts) == 3
    assert {name for name, _ in experts.named_children()} == {
        *"012",
        "act_fn",
        "post_expert_norm",
    }
