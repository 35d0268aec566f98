from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import ModelError, TargetError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.variants import Variants

IDS = torch.arange(24).reshape(2, 12) + 3


def logits(model):
    with torch.no_grad():
        return (model(input_ids=IDS) if hasattr(model, "lm_head") else model(IDS))[0]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("form", ["tucker", "low-rank"])
def test_a_trial_does_what_the_compressed_model_does(kind, form, make_model):
    model = make_model(kind)
    space = DesignSpace(model, ranks=(5, 1, 3), formats=(form,))
    variants = Variants(model, space)
    names = tuple(space.tensors)
    for configuration in (
        space.all_tensors([1], 3),
        space.all_tensors([0, 1], 5),
        Configuration((0,), names[:1] + names[-1:], 1, form),
    ):
        wanted = space.compress(copy.deepcopy(model), configuration, progress=False)
        with variants.applied(configuration) as changed:
            assert torch.allclose(logits(changed), logits(wanted), atol=1e-5)
            count = sum(p.numel() for p in changed.parameters())
            assert count == space.cost(configuration).params


@given(data=st.data())
def test_the_model_comes_back_bit_for_bit(data, make_model, state, same):
    model = make_model(data.draw(st.sampled_from(["llama", "gpt2"])))
    model.train(data.draw(st.booleans()))
    next(iter(model.parameters())).requires_grad_(False)
    space = DesignSpace(model, formats=("tucker", "low-rank"))
    variants = Variants(model, space)
    before, random = state(model), torch.get_rng_state()
    layers = data.draw(st.sampled_from([[0], [1], [0, 1]]))
    form = data.draw(st.sampled_from(space.formats))
    fails = data.draw(st.booleans())
    try:
        with variants.applied(space.all_tensors(layers, form=form)) as changed:
            changed.eval()
            logits(changed)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    same(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


def test_modules_are_as_trainable_as_those_they_replace(model, space):
    model.requires_grad_(False).train()
    model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    with Variants(model, space).applied(space.all_tensors([1])) as changed:
        attention = changed.model.layers[1].self_attn
        assert all(p.requires_grad for p in attention.q_proj.parameters())
        assert not any(p.requires_grad for p in attention.k_proj.parameters())
        assert attention.q_proj.training


def test_each_matrix_is_decomposed_once(model, monkeypatch):
    from tnlm.decompositions.low_rank import LowRank

    ranks = []
    fit = LowRank.fit

    def counted(self, weight, metric, spec):
        ranks.append(spec.rank)
        return fit(self, weight, metric, spec)

    monkeypatch.setattr(LowRank, "fit", counted)
    space = DesignSpace(model, ranks=(1, 4), formats=("tucker", "low-rank"))
    variants = Variants(model, space)
    for form in space.formats:
        for rank in space.ranks:
            with variants.applied(space.all_tensors([0, 2], rank, form)):
                pass
    assert ranks == [4] * 14


def test_half_precision_keeps_its_dtype(model, space):
    model.bfloat16()
    with Variants(model, space).applied(space.all_tensors([0])) as changed:
        assert {p.dtype for p in changed.parameters()} == {torch.bfloat16}


def test_the_dense_configuration_changes_nothing(model, space):
    layer = model.model.layers[0].mlp.up_proj
    with Variants(model, space).applied(DENSE) as changed:
        assert changed.model.layers[0].mlp.up_proj is layer


def test_other_models_are_refused(space, tiny_llama, model):
    with pytest.raises(TargetError, match="has no such matrix"):
        Variants(tiny_llama(num_hidden_layers=2), space)
    wide = tiny_llama(num_hidden_layers=4, intermediate_size=40)
    with pytest.raises(TargetError, match=r"gate_proj of \(48, 32\); the model has \(40, 32\)"):
        Variants(wide, space)
    with pytest.raises(ModelError, match="PreTrainedModel is wanted"):
        Variants(torch.nn.Linear(2, 2), space)
    model.model.layers[3].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="holds 1 NaN"):
        Variants(model, space)
