from __future__ import annotations

import copy
import logging
from dataclasses import replace

import pytest
import torch

import tnlm
from tests import mixtures
from tnlm.errors import CheckpointError, EvaluationError, OptionError
from tnlm.studies.level_search import Selection
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
