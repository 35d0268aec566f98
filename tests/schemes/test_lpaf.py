"""LPAF in one call: pruned, fitted, trained with the pruned weights beside, on every kind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BertForSequenceClassification

import tnlm
from tnlm.errors import CalibrationError, OptionError, TrainingError
from tnlm.recovery.guard import GuardedTrainer
from tnlm.recovery.mixed_rank import MixedRank, MixedRankTrainer
from tnlm.recovery.pruning import movement
from tnlm.recovery.pruning.column_weights import column_weights
from tnlm.recovery.pruning.movement import MovementTrainer

IDS = torch.arange(512) * 7 % 61 + 3
LINES = {"calibration": IDS, "max_length": 32, "recover_tokens": 1024, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def rows(word_tokenizer):
    """Rows whose first word tells the class."""
    texts = [{"text": f"word{i % 3} word9 word{20 + i}", "label": i % 3} for i in range(24)]
    return tnlm.labelled(texts, word_tokenizer)


@pytest.fixture
def found(monkeypatch):
    """Catch what pruning finds."""
    kept, prune = [], movement.movement_prune

    def watched(*given, **named):
        kept.append(prune(*given, **named))
        return kept[-1]

    monkeypatch.setattr(movement, "movement_prune", watched)
    return kept


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_same(model, before, flags):
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not model.training
    assert not hasattr(model.config, "quantization_config")
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2"])
def test_the_result_saves_loads_and_generates(kind, make_model, tmp_path):
    model = make_model(kind)
    before = state_of(model)
    assert tnlm.compress(model, "lpaf", keep_targets=0.5, **LINES) is model
    report = tnlm.report(model)
    assert report.plan.request["recover"] == "mixed-rank"
    assert report.seconds["prune"] > 0
    assert report.seconds["recover"] > 0
    assert report.parameters_after == model.num_parameters()
    assert not any(isinstance(module, MixedRank) for module in model.modules())
    made = model.config.quantization_config.modules
    for name, parameter in model.named_parameters():
        if name in before and name.removesuffix(".bias") not in made:
            assert torch.equal(parameter, before[name]), name
    tnlm.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS[None, :16]).logits, model(IDS[None, :16]).logits)
    text = again.generate(IDS[None, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert text.shape == (1, 8)


def test_a_classifier_learns_from_rows_alone(make_model, rows, tmp_path):
    config = make_model("bert").config
    config.num_labels = 3
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    options = {"rank": 4, "ignore": ["classifier"], "max_length": 16, "progress": False}
    tnlm.compress(model, "lpaf", training=rows, recover_tokens=256, **options)
    assert model.bert.encoder.layer[0].attention.self.query.network.sizes["r"] == 4
    tnlm.save(model, tmp_path)
    again = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_masked_model_needs_a_mask_token(make_model, word_tokenizer):
    tokenizer = copy.deepcopy(word_tokenizer)
    model = make_model("masked-bert")
    with pytest.raises(TrainingError, match="mask token"):
        tnlm.compress(model, "lpaf", tokenizer=tokenizer, **LINES)
    tokenizer.mask_token = "word60"
    tnlm.compress(model, "lpaf", tokenizer=tokenizer, **LINES)
    assert tnlm.report(model).seconds["recover"] > 0


@pytest.mark.parametrize("metric", ["movement", "pruned"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_fitted_are_the_pruned_weights(kind, metric, make_model, found):
    model = make_model(kind)
    options = LINES | {"rank": 5, "gauge": False}
    tnlm.compress(model, "lpaf", metric=metric, recover="none", **options)
    (pruned,) = found
    name = "model.layers.0.self_attn.v_proj" if kind == "llama" else "transformer.h.1.attn.c_attn.v"
    module = name.removesuffix(".v") if kind == "gpt2" else name
    stored = pruned.model.get_submodule(module).weight.detach()
    weight = (stored.T[64:96] if kind == "gpt2" else stored).double()
    assert torch.equal(weight != 0, pruned.masks[name])
    columns = torch.ones(32).double()
    if metric == "movement":
        columns = column_weights(pruned.scores[name], pruned.masks[name])
    scale = columns.sqrt()
    U, S, V = torch.linalg.svd(weight * scale, full_matrices=False)
    expected = U[:, :5] @ torch.diag(S[:5]) @ V[:5] / scale
    fitted = model.get_submodule(name).to_dense().detach().double()
    torch.testing.assert_close(fitted * scale, expected * scale, rtol=1e-3, atol=1e-5)
    error = (S[5:].norm() / S.norm()).item()
    (layer,) = [layer for layer in tnlm.report(model).plan.layers if layer.name == name]
    assert layer.error == pytest.approx(error, rel=1e-3)


def test_layers_are_trained_beside_the_pruned_weights(make_model, found, monkeypatch):
    seen = []

    def start(self, *given, **named):
        seen.extend(layer.dense for layer in self._layers)
        return train(self, *given, **named)

    train = MixedRankTrainer.train
    monkeypatch.setattr(MixedRankTrainer, "train", start, raising=False)
    tnlm.compress(make_model("gpt2"), "lpaf", **LINES)
    (pruned,) = found
    assert len(seen) == len(pruned.masks) == 12
    for dense, mask in zip(seen, pruned.masks.values(), strict=True):
        assert torch.equal(dense != 0, mask)


@pytest.mark.parametrize("recover", ["mixed-rank", "mixed-rank-frozen"])
def test_the_pruned_weights_learn_too_unless_they_are_frozen(recover, make_model, monkeypatch):
    asked, init = [], MixedRankTrainer.__init__

    def start(self, **named):
        init(self, **named)
        asked.extend(layer.dense.requires_grad for layer in self._layers)

    monkeypatch.setattr(MixedRankTrainer, "__init__", start)
    chosen = {} if recover == "mixed-rank" else {"recover": recover}
    model = tnlm.compress(make_model("gpt2"), "lpaf", **chosen, **LINES)
    assert asked == [recover == "mixed-rank"] * 12
    assert tnlm.report(model).plan.request["recover"] == recover


def test_mixed_rank_recovery_goes_with_any_scheme(make_model):
    model = make_model("gpt2")
    tnlm.compress(model, "svd-llm", recover="mixed-rank", **LINES)
    plain = tnlm.compress(make_model("gpt2"), "svd-llm", calibration=IDS, max_length=32)
    assert tnlm.report(model).seconds["recover"] > 0
    assert model.num_parameters() == plain.num_parameters()
    narrowed = tnlm.compress(make_model("llama"), "modegpt", recover="mixed-rank", **LINES)
    assert tnlm.report(narrowed).seconds["recover"] > 0


def test_blocks_may_share_factors(make_model):
    model = make_model("llama")
    tnlm.compress(model, "lpaf", share=2, keep_targets=0.4, **LINES)
    first, second = (layer.self_attn.q_proj.right.weight for layer in model.model.layers)
    assert first is second


def test_a_plan_prunes_nothing_and_gives_the_same_model(make_model):
    model = make_model("llama")
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    plan = tnlm.plan(model, "lpaf", keep_targets=0.4, **LINES)
    check_same(model, before, flags)
    plan = tnlm.Plan.from_json(plan.to_json())
    given = {name: value for name, value in LINES.items() if name != "recover_tokens"}
    tnlm.compress(model, plan, **given)
    again = tnlm.compress(make_model("llama"), "lpaf", keep_targets=0.4, **LINES)
    assert torch.equal(model(IDS[None, :16]).logits, again(IDS[None, :16]).logits)


@pytest.mark.parametrize("trainer", [MovementTrainer, MixedRankTrainer])
@pytest.mark.parametrize("error", [KeyboardInterrupt, TrainingError])
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
def test_what_fails_leaves_the_model(kind, error, trainer, make_model, monkeypatch):
    model = make_model(kind)
    model.get_input_embeddings().requires_grad_(False)
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    step, random = GuardedTrainer.training_step, torch.random.get_rng_state()

    def broken(self, *given, **named):
        if isinstance(self, trainer) and self.state.global_step == 2:
            raise error("as asked")
        return step(self, *given, **named)

    monkeypatch.setattr(GuardedTrainer, "training_step", broken)
    with pytest.raises(error, match="as asked"):
        tnlm.compress(model, "lpaf", **LINES)
    check_same(model, before, flags)
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_loss_that_is_not_finite_leaves_the_model(make_model):
    model = make_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("nan")
    before = {name: tensor.nan_to_num() for name, tensor in state_of(model).items()}
    with pytest.raises(TrainingError, match="no finite loss"):
        tnlm.compress(model, "lpaf", **LINES)
    after = {name: tensor.nan_to_num() for name, tensor in state_of(model).items()}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"calibration": None}, CalibrationError, "needs data; pass calibration="),
        (
            {"calibration": None, "training": IDS, "allocation": "loss"},
            CalibrationError,
            "needs data",
        ),
        ({"recover_tokens": 0}, OptionError, "recover_tokens=0; allowed"),
        ({"recover": "none", "recover_tokens": -1}, OptionError, "recover_tokens=-1; allowed"),
        ({"cache_dir": "cache"}, OptionError, "metric='movement' trains and has none"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, error, message, make_model):
    model = make_model("llama")
    before, flags = state_of(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        tnlm.compress(model, "lpaf", **(LINES | wrong))
    check_same(model, before, flags)


def test_a_model_without_a_loss_is_refused(make_model, tmp_path):
    make_model("llama").save_pretrained(tmp_path)
    with pytest.raises(tnlm.TnlmError, match="cannot be trained here"):
        tnlm.compress(AutoModel.from_pretrained(tmp_path), "lpaf", **LINES)
