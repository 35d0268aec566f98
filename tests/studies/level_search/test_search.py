from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch

import tnlm
from tests import mixtures
from tnlm.allocation.curves import curves
from tnlm.errors import CheckpointError, EvaluationError, OptionError
from tnlm.studies.level_search import Selection, evolution
from tnlm.studies.level_search import search as search_module
from tnlm.studies.level_search.divergence import Divergence

IDS = torch.arange(512) * 7 % 61 + 3
TEXT = torch.randint(3, 61, (128,), generator=torch.Generator().manual_seed(1))
FEW = Selection(offspring=4, survivors=(2, 1), tokens=(32, 128))
ASKED = {
    "search": TEXT,
    "calibration": IDS,
    "max_length": 32,
    "num_samples": 8,
    "selection": FEW,
    "generations": 3,
    "keep_targets": 0.6,
    "progress": False,
}


def kl(dense, model):
    ids = TEXT.reshape(-1, 32)
    with torch.no_grad():
        p, q = (each(ids).logits.double().log_softmax(-1) for each in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_result_is_no_worse_than_its_start_and_what_was_measured(kind, make_model):
    dense, model = make_model(kind), make_model(kind)
    found = tnlm.level_search(model, **ASKED)
    assert found.after <= found.before
    assert list(found.generations) == sorted(found.generations, reverse=True)
    assert found.after == found.generations[-1] == pytest.approx(kl(dense, model), rel=2e-2)
    plan = tnlm.report(model).plan
    assert plan.targets_after.params <= 0.6 * plan.targets_before.params
    assert str(found.tokens)[0] in str(found)


def test_the_start_is_the_least_predicted_loss(make_model):
    """Without offspring that differ, the result is that of compress."""
    none = replace(FEW, offspring=1, survivors=(1, 1))
    searched, plain = make_model("llama"), make_model("llama")
    asked = {key: ASKED[key] for key in ("calibration", "max_length", "num_samples", "progress")}
    found = tnlm.level_search(searched, **{**ASKED, "selection": none, "generations": 1})
    tnlm.compress(plain, "auto", keep_targets=0.6, **asked)
    assert found.before == pytest.approx(kl(make_model("llama"), plain), rel=2e-2)


def test_a_search_goes_on_where_it_stopped(make_model, tmp_path, monkeypatch):
    whole = make_model("llama")
    wanted = tnlm.level_search(whole, **ASKED)
    measure, calls = Divergence.__call__, []

    def stops(self, model, tokens):
        calls.append(tokens)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return measure(self, model, tokens)

    monkeypatch.setattr(Divergence, "__call__", stops)
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        tnlm.level_search(model, output_dir=tmp_path, **ASKED)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    found = tnlm.level_search(model, output_dir=tmp_path, **ASKED)
    assert found.generations == wanted.generations
    assert found.tokens < wanted.tokens
    assert torch.equal(model(IDS[None, :9]).logits, whole(IDS[None, :9]).logits)
    with pytest.raises(CheckpointError, match="the journal of other trials"):
        tnlm.level_search(make_model("llama"), output_dir=tmp_path, **{**ASKED, "seed": 5})


def test_a_divergence_that_is_not_finite_is_refused(make_model, monkeypatch):
    from tnlm.studies.level_search import divergence

    monkeypatch.setattr(divergence, "logit_loss", lambda *_, **__: torch.tensor(float("nan")))
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(EvaluationError, match="the divergence from the dense model is nan"):
        tnlm.level_search(model, **ASKED)
    assert model.state_dict().keys() == before.keys()


def test_experts_are_searched_as_one_unit():
    model = mixtures.make("Mixtral")
    found = tnlm.level_search(model, **{**ASKED, "generations": 1})
    assert found.after <= found.before
    assert model(IDS[None, :9]).logits.isfinite().all()


def test_the_cost_is_told_before_the_start(make_model, caplog):
    with caplog.at_level(logging.INFO, "tnlm"):
        tnlm.level_search(make_model("llama"), **{**ASKED, "generations": 1})
    # 4 x 32 and 2 x 128, and the parent's 128.
    assert "up to 512 tokens through compressed models and 128 through the dense" in caplog.text
    assert Selection().cost == 16 * 512 + 4 * 2048 + 2 * 8192


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scheme": "svd-llm"}, OptionError, "allowed: allocation='loss'"),
        (
            {"cascade": "anchored", "scheme": "svd-llm", "allocation": "loss"},
            OptionError,
            "cascade=",
        ),
        ({"generations": 0}, OptionError, "generations=0"),
        ({"selection": replace(FEW, survivors=(2, 2))}, OptionError, "and 1 at the end"),
        ({"selection": replace(FEW, survivors=(5, 1))}, OptionError, "none larger than"),
        ({"selection": replace(FEW, tokens=(32,))}, OptionError, "one count for each"),
        ({"selection": replace(FEW, tokens=(32, 0))}, OptionError, "tokens=0"),
        ({"selection": Selection(1, (), ())}, OptionError, "and 1 at the end"),
        ({"selection": 4}, OptionError, "selection=4; give a Selection"),
        ({"refine": 1}, OptionError, "refine= in a search over levels would change the model"),
        ({"recover": "finetune", "training": IDS}, OptionError, "recover= in a search over levels"),
        ({"search": TEXT[:64]}, EvaluationError, "has 64 tokens, but a stage measures 128"),
    ],
)
def test_what_cannot_be_searched_is_refused(change, error, text, make_model):
    with pytest.raises(error, match=text):
        tnlm.level_search(make_model("llama"), **{**ASKED, **change})


@pytest.mark.parametrize("kind", ["bert", "masked-bert"])
def test_a_model_that_is_not_causal_is_refused(kind, make_model):
    with pytest.raises(EvaluationError, match="a search over levels needs a causal"):
        tnlm.level_search(make_model(kind), **ASKED)


def test_the_stages_may_be_lists():
    Selection(3, [2, 1], [16, 32]).check()


SCALED = {**ASKED, "search": torch.cat([TEXT, IDS[:64]]), "scale_tokens": 64, "generations": 0}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_scaled_curves_start_the_search_where_they_are_better(kind, make_model):
    model = make_model(kind)
    found = tnlm.level_search(model, **SCALED)
    assert found.after == min(found.before, found.scaled)
    assert all(scale > 0 for scale in found.scales.values())
    assert found.generations == ()
    plan = tnlm.report(model).plan
    assert plan.targets_after.params <= 0.6 * plan.targets_before.params
    assert str(found).splitlines()[-1].startswith("allocation on scaled curves: ")
    assert json.loads(found.to_json())["scales"] == found.scales


def test_units_are_named_by_what_holds_their_matrices(make_model):
    names = tnlm.level_search(make_model("llama"), **SCALED).scales.keys()
    assert {name.rpartition(".")[2] for name in names} == {"mlp", "self_attn"}
    assert len(names) == 2 * make_model("llama").config.num_hidden_layers


def test_units_over_the_same_modules_are_named_by_their_matrices(make_model):
    """Stacks of one matrix each, over all blocks, have a common beginning of their names."""
    asked = {**SCALED, "scheme": "stack-tucker", "allocation": "loss"}
    names = tnlm.level_search(make_model("llama"), **asked).scales.keys()
    assert len(names) == 7
    assert "model.layers.0.mlp.up_proj+model.layers.1.mlp.up_proj" in names


def test_a_layer_whose_losses_are_predicted_too_high_gets_a_smaller_scale(make_model, monkeypatch):
    def scale_of(found_by):
        model = make_model("llama")
        for parameter in model.parameters():
            parameter.data.mul_(8.0)  # so that divergences stand far above rounding
        monkeypatch.setattr(search_module, "curves", found_by)
        return tnlm.level_search(model, **SCALED).scales["model.layers.0.mlp"]

    def wrongly(problem):
        return [
            [replace(c, loss=10.0 * c.loss) for c in curve] if ".0.mlp" in str(curve) else curve
            for curve in curves(problem)
        ]

    assert scale_of(wrongly) < 0.5 * scale_of(curves)


def test_a_scaled_plan_that_is_worse_is_not_kept(make_model, monkeypatch, caplog):
    monkeypatch.setattr(
        evolution, "scales_of", lambda found, *_, **__: [1e3] + [1.0] * (len(found) - 1)
    )
    model, plain = make_model("llama"), make_model("llama")
    with caplog.at_level(logging.WARNING, "tnlm"):
        found = tnlm.level_search(model, **SCALED)
    assert found.scaled > found.before == found.after
    assert not found.unchanged
    assert "not better: the unscaled one is kept" in caplog.text
    assert "not better: the unscaled one is kept" in str(found)
    asked = {key: ASKED[key] for key in ("calibration", "max_length", "num_samples", "progress")}
    tnlm.compress(plain, "auto", keep_targets=0.6, **asked)
    assert torch.equal(model(IDS[None, :9]).logits, plain(IDS[None, :9]).logits)


def test_scales_that_change_nothing_are_said_to(make_model, monkeypatch, caplog):
    monkeypatch.setattr(evolution, "scales_of", lambda found, *_, **__: [1.0] * len(found))
    with caplog.at_level(logging.WARNING, "tnlm"):
        found = tnlm.level_search(make_model("llama"), **SCALED)
    assert found.unchanged
    assert found.scaled == found.before
    assert str(found).endswith("the same allocation")
    assert "scaled curves" not in caplog.text


def test_another_plan_that_is_equally_good_is_not_kept(make_model, monkeypatch, caplog):
    monkeypatch.setattr(
        evolution, "scales_of", lambda found, *_, **__: [1e3] + [1.0] * (len(found) - 1)
    )
    monkeypatch.setattr(Divergence, "__call__", lambda *_, **__: 1.0)
    with caplog.at_level(logging.WARNING, "tnlm"):
        found = tnlm.level_search(make_model("llama"), **SCALED)
    assert found.scaled == found.before
    for text in (caplog.text, str(found)):
        assert "not better: the unscaled one is kept" in text


def test_scaling_goes_on_where_it_stopped(make_model, tmp_path, monkeypatch):
    wanted = tnlm.level_search(make_model("llama"), **SCALED)
    measure, calls = Divergence.__call__, []

    def stops(self, model, tokens):
        calls.append(tokens)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(self, model, tokens)

    monkeypatch.setattr(Divergence, "__call__", stops)
    with pytest.raises(KeyboardInterrupt):
        tnlm.level_search(make_model("llama"), output_dir=tmp_path, **SCALED)
    found = tnlm.level_search(make_model("llama"), output_dir=tmp_path, **SCALED)
    assert found.scales == wanted.scales
    assert found.after == wanted.after
    assert found.tokens < wanted.tokens


def test_units_are_measured_apart_from_the_stages(make_model, monkeypatch):
    """Text before the windows apart changes no scale, and text in them changes no start."""
    first = tnlm.level_search(make_model("llama"), **SCALED)
    other = torch.randint(3, 61, (128,), generator=torch.Generator().manual_seed(2))
    changed = {**SCALED, "search": torch.cat([other, IDS[:64]])}
    assert tnlm.level_search(make_model("llama"), **changed).scales == first.scales
    changed = {**SCALED, "search": torch.cat([TEXT, other[:64]])}
    second = tnlm.level_search(make_model("llama"), **changed)
    assert second.before == first.before
    assert second.scales != first.scales


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"scale_tokens": -1}, OptionError, "scale_tokens=-1"),
        ({"scale_tokens": 0}, OptionError, "at least 1, or 0 with scale_tokens="),
        ({"scale_tokens": 65}, EvaluationError, "has 64 tokens after those that a stage measures"),
    ],
)
def test_scales_that_cannot_be_measured_are_refused(change, error, text, make_model):
    with pytest.raises(error, match=text):
        tnlm.level_search(make_model("llama"), **{**SCALED, **change})
