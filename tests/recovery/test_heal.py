from __future__ import annotations

import copy
import functools
import logging

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import BertForSequenceClassification

import tnlm
from tests import mixtures
from tnlm.calibration.data import token_batches
from tnlm.calibration.labels import with_labels
from tnlm.errors import (
    CalibrationError,
    ModelError,
    OptionError,
    RankError,
    TargetError,
    TrainingError,
)
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.made import made_layers
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.recovery import lora_training
from tnlm.recovery.goals import divergence_from
from tnlm.recovery.heal import heal

IDS = torch.arange(256) * 7 % 61 + 3
BATCHES = token_batches(IDS, max_length=32, batch_size=2)
UP = "model.layers.1.mlp.up_proj"
FUSED = "transformer.h.0.attn.c_attn.q"
MIXED = {"calibration": IDS, "max_length": 16, "num_samples": 4, "progress": False}
SMALL = {"keep_targets": 0.4}
run = functools.partial(heal, rank=2, tokens=1024, learning_rate=1e-2, progress=False)


def loss_of(model):
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in with_labels(model, BATCHES))


def count(model):
    return sum(p.numel() for p in model.parameters())


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}


def check_saved(model, tmp_path):
    tnlm.save(model, tmp_path / "saved")
    loaded = tnlm.load(tmp_path / "saved")
    ids = IDS[:16][None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    report = tnlm.report(model)
    assert report.parameters_after == count(model)
    assert str(report)
    assert report.to_json()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "kron", "tt", "tucker", "btt"])
def test_on_factors_every_format_heals_without_growth(kind, scheme, compressed, tmp_path):
    model = compressed(kind, scheme, **SMALL)
    before, size = loss_of(model), count(model)
    names = list(model.state_dict())
    orders = {k: v.clone() for k, v in model.state_dict().items() if k.endswith("_order")}
    free = {name: p.requires_grad for name, p in model.named_parameters()}
    assert run(model, with_labels(model, BATCHES)) is model
    assert loss_of(model) < before
    assert count(model) == size
    assert list(model.state_dict()) == names
    assert all(torch.equal(model.state_dict()[k], v) for k, v in orders.items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == free
    report = tnlm.report(model)
    assert all(layer.error is None for layer in report.plan.layers if layer.format)
    assert report.seconds["heal"] > 0
    check_saved(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["modegpt", "auto"])
def test_narrowed_feed_forwards_heal_too(kind, scheme, compressed, tmp_path):
    asked = {"targets": r".*\.mlp\..*", "keep_targets": 0.35} if scheme == "auto" else SMALL
    model = compressed(kind, scheme, calibration=IDS, **asked)
    cut = {"modegpt": "sliced", "auto": "narrowed"}[scheme]
    narrowed = [made.name for made in made_layers(model) if made.entry["kind"] == cut]
    leaves = [name if cut == "sliced" else f"{name}.left" for name in narrowed]
    weights = {name: model.get_submodule(name).weight.clone() for name in leaves}
    before, size = loss_of(model), count(model)
    run(model, with_labels(model, BATCHES), on="factors")
    assert loss_of(model) < before
    assert count(model) == size
    assert narrowed
    assert all(not torch.equal(model.get_submodule(n).weight, w) for n, w in weights.items())
    check_saved(model, tmp_path)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("gauge", [True, False])
@pytest.mark.parametrize("merge", ["concatenate", "retruncate"])
def test_on_layers_low_rank_takes_the_lora_in(kind, gauge, merge, compressed, tmp_path):
    model = compressed(kind, "svd", gauge=gauge, rank=4)
    before, size, params = loss_of(model), count(model), tnlm.report(model).parameters_after
    run(model, with_labels(model, BATCHES), on="layers", merge=merge)
    grown = 6 if merge == "concatenate" else 4
    for layer in layers(model).values():
        assert layer.network.sizes["r"] == grown
        assert (layer.network.gauge is not None) == gauge
    for layer in tnlm.report(model).plan.layers:
        assert layer.spec["rank"] == grown
        extra = (layer.shape[0] + layer.shape[1]) * grown - gauge * grown**2
        assert layer.after.params == extra
    if merge == "concatenate":
        assert loss_of(model) < before
    else:
        assert count(model) == size == params
    check_saved(model, tmp_path)


@pytest.mark.parametrize(("kind", "name"), [("llama", UP), ("gpt2", FUSED)])
def test_concatenation_is_what_was_trained(kind, name, compressed, monkeypatch):
    seen = {}

    def trained(model, adapters, *_):
        for adapter in adapters.values():
            torch.manual_seed(0)
            with torch.no_grad():
                adapter.B.normal_()
        seen["delta"] = adapters[name].lora().delta()
        with torch.no_grad():
            seen["logits"] = model(IDS[:16][None]).logits

    monkeypatch.setattr("tnlm.recovery.heal.train", trained)
    model = compressed(kind, "svd", rank=4)
    before = model.get_submodule(name).to_dense().detach().double()
    run(model, with_labels(model, BATCHES), on="layers")
    after = model.get_submodule(name).to_dense().detach().double()
    torch.testing.assert_close(after, before + seen["delta"], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        logits = model(IDS[:16][None]).logits
    torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)


def test_factors_are_what_was_trained(compressed, monkeypatch):
    seen = {}

    def trained(model, adapters, *_):
        torch.manual_seed(0)
        with torch.no_grad():
            for adapter in adapters.values():
                adapter.B.normal_(std=0.1)
            seen["logits"] = model(IDS[:16][None]).logits

    monkeypatch.setattr("tnlm.recovery.heal.train", trained)
    for scheme in ("svd", "kron", "tt"):
        model = compressed("llama", scheme)
        run(model, with_labels(model, BATCHES))
        with torch.no_grad():
            logits = model(IDS[:16][None]).logits
        torch.testing.assert_close(logits, seen["logits"], rtol=1e-4, atol=1e-4)


def test_cutting_back_is_best_in_the_metric_given(compressed):
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0, 2, 32)
    metric = InputMoment(x.T @ x)
    found = []
    for given in (None, {UP: metric}):
        model = compressed("llama", "svd", rank=4)
        options = {"modules": [UP], "on": "layers", "metrics": given}
        exact = run(copy.deepcopy(model), with_labels(model, BATCHES), modules=[UP], on="layers")
        run(model, with_labels(model, BATCHES), merge="retruncate", **options)
        weight = exact.get_submodule(UP).to_dense().detach()
        error = weight - model.get_submodule(UP).to_dense().detach()
        found.append((metric.norm(error), Metric().norm(error)))
    assert found[1][0] < found[0][0]
    assert found[0][1] < found[1][1]


def test_it_may_start_from_the_residual(compressed, make_model, monkeypatch):
    monkeypatch.setattr("tnlm.recovery.heal.train", lambda *_: None)
    model, dense = compressed("llama", "svd", rank=4), make_model("llama")
    originals = {name: dense.get_submodule(name).weight.detach() for name in layers(model)}
    run(model, with_labels(model, BATCHES), on="layers", start="residual", originals=originals)
    direct = compressed("llama", "svd", rank=6)
    for name, layer in layers(model).items():
        other = direct.get_submodule(name).to_dense()
        torch.testing.assert_close(layer.to_dense(), other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("on", ["factors", "layers"])
def test_an_adapter_stays_and_is_charged(on, compressed):
    model = compressed("llama", "svd", **SMALL)
    before = loss_of(model)
    run(model, with_labels(model, BATCHES), on=on, merge="adapter", modules=[UP])
    adapters = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert len(adapters) == {"factors": 2, "layers": 1}[on]
    assert loss_of(model) < before
    assert tnlm.report(model).parameters_after == count(model)
    with pytest.raises(ModelError, match="already has adapters"):
        run(model, with_labels(model, BATCHES))


def test_a_model_with_adapters_is_not_healed_again(compressed):
    model = compressed("llama", "svd", **SMALL)
    run(model, with_labels(model, BATCHES), on="layers", merge="adapter", modules=[UP])
    with pytest.raises(ModelError, match="already has adapters"):
        run(model, with_labels(model, BATCHES))


@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_a_base_of_eight_bits_takes_adapters(compressed):
    quantization = pytest.importorskip("torchao.quantization")
    model = compressed("llama", "svd", **SMALL)
    quantization.quantize_(model.model, quantization.Int8WeightOnlyConfig())
    held = {name: layer.left.weight.dequantize() for name, layer in layers(model).items()}
    with pytest.raises(
        ModelError, match=r"is quantized, so no LoRA can be merged .*merge='adapter'"
    ):
        run(model, with_labels(model, BATCHES))
    before = loss_of(model)
    run(model, with_labels(model, BATCHES), merge="adapter")
    assert loss_of(model) < before
    for name, weight in held.items():
        assert torch.equal(
            model.get_submodule(f"{name}.left").base_layer.weight.dequantize(), weight
        )


def test_shared_factors_stay_shared(compressed, tmp_path):
    model = compressed("llama", "basis-sharing")
    shared = model.model.layers[0].self_attn.q_proj.right.weight.detach().clone()
    run(model, with_labels(model, BATCHES))
    one, two = (layer.self_attn.q_proj.right.weight for layer in model.model.layers)
    assert one is two
    assert torch.equal(one, shared)
    check_saved(model, tmp_path)
    with pytest.raises(OptionError, match="shares a factor"):
        run(model, with_labels(model, BATCHES), on="layers", merge="retruncate")


def test_other_linears_and_classifiers(tiny_bert):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_bert().config).eval()
    ids = IDS.reshape(8, 32)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch["labels"] = torch.arange(8) % 2
    tnlm.compress(model, "svd", progress=False, **SMALL)
    before = float(model(**batch).loss.detach())
    run(model, [batch], modules=["classifier", "bert.encoder.layer.0.output.dense"], tokens=4096)
    assert float(model(**batch).loss.detach()) < before


def test_half_precision_heals_in_float32(compressed):
    model = compressed("llama", "svd", **SMALL).bfloat16()
    before = loss_of(model)
    run(model, with_labels(model, BATCHES))
    assert model.get_submodule(UP).left.weight.dtype == torch.bfloat16
    assert loss_of(model) < before


def test_it_repeats(compressed):
    one, two = (run(m, with_labels(m, BATCHES)) for m in (compressed("llama", "svd") for _ in "ab"))
    state = two.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in one.state_dict().items())


def test_training_that_does_not_help_is_undone(compressed, caplog, monkeypatch):
    model, losses = compressed("llama", "svd"), iter([1.0, 2.0, 3.0])
    before = {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(lora_training, "_mean_loss", lambda *_: next(losses))
    with caplog.at_level(logging.WARNING, "tnlm"):
        run(model, with_labels(model, BATCHES))
    assert "did not lower the loss (1 -> 2): undone" in caplog.text
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_training_that_goes_too_far_is_taken_back_in_part(compressed, caplog, monkeypatch):
    losses = {"all": [2.0, 1.0, 3.0], "half": [2.0, 3.0, 1.0, 1.5]}
    found = {}
    for kept, measured in losses.items():
        model, each = compressed("llama", "svd"), iter(measured)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        monkeypatch.setattr(lora_training, "_mean_loss", lambda *_, each=each: next(each))
        with caplog.at_level(logging.INFO, "tnlm"):
            run(model, with_labels(model, BATCHES))
        found[kept] = {k: (v - start[k]).double().norm() for k, v in model.state_dict().items()}
        assert not list(each)
    assert "kept 0.5 of the change; all of it gives 3" in caplog.text
    for name, change in found["all"].items():  # B starts at 0, and A, trained less, is halved less
        if change > 0:
            assert 0.4 < found["half"][name] / change < 0.6


def test_training_that_diverges_stops_and_leaves_the_model(compressed, lose_the_loss):
    model = compressed("llama", "svd")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lose_the_loss(model, after=6)
    with pytest.raises(TrainingError, match=r"the loss is nan on batch \d; lower learning_rate"):
        run(model, with_labels(model, BATCHES))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_tokens_are_counted_without_padding():
    batches = token_batches([[3, 4, 5], [6, 7]], batch_size=1)
    assert sorted(lora_training.schedule_of(batches, 5, 0)) == [0, 1]
    assert len(lora_training.schedule_of(batches, 6, 0)) == 3
    empty = {"attention_mask": torch.zeros(1, 2)}
    with pytest.raises(CalibrationError, match="batch 1 has only padding"):
        lora_training.schedule_of([*batches[:1], empty], 6, 0)


def test_failures_leave_the_model(compressed, make_model, monkeypatch):
    model = compressed("llama", "svd", rank=14)
    data = with_labels(model, BATCHES)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    config = model.config.quantization_config.to_dict()
    silent = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in data]
    for options, error, text in (
        ({"on": "layer"}, OptionError, "on='layer'; did you mean 'layers'"),
        ({"merge": "concatenate"}, OptionError, "merge='concatenate' with on='factors'"),
        ({"start": "svd"}, OptionError, "start='svd'"),
        ({"start": "residual"}, OptionError, "originals= must be given with"),
        ({"originals": {}}, OptionError, "originals= must be given with"),
        ({"start": "residual", "originals": {}}, OptionError, "needs on='layers'"),
        ({"start": "residual", "originals": {}, "on": "layers"}, OptionError, "dense weight"),
        ({"metrics": {UP: Metric()}}, OptionError, "metrics= has no effect"),
        ({"rank": 0}, OptionError, "rank=0"),
        ({"tokens": 0.5}, OptionError, "tokens=0.5"),
        ({"alpha": -1}, OptionError, "alpha=-1"),
        ({"learning_rate": 0}, OptionError, "learning_rate=0"),
        ({"modules": ["nothing"]}, TargetError, "'nothing'"),
        ({"modules": ["lm_head"], "on": "layers"}, OptionError, "needs low rank, but lm_head"),
        ({"on": "layers", "rank": 3}, RankError, "rank 14 \\+ 3 is larger than a dense 16x32"),
        ({"on": "layers", "rank": 17}, RankError, "rank=17"),
        ({"batches": []}, CalibrationError, "no batch"),
        ({"batches": silent}, CalibrationError, "none of them is predicted"),
    ):
        with pytest.raises(error, match=text):
            run(model, options.pop("batches", data), **options)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert model.config.quantization_config.to_dict() == config
    with pytest.raises(TargetError, match="no compressed linear layer"):
        run(make_model("llama"), data)
    with pytest.raises(ModelError, match="not compressed"):
        run(make_model("llama"), data, modules=[UP], on="layers")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tnlm.recovery.merging.attach", fail)
    with pytest.raises(KeyboardInterrupt):
        run(model, data, on="layers", merge="retruncate")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.config.quantization_config.to_dict() == config


def test_experts_that_were_dropped_are_not_healed():
    model = tnlm.compress(mixtures.make("Mixtral"), "reap", keep_targets=0.75, **MIXED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data, experts = with_labels(model, BATCHES), "model.layers.0.mlp.experts"
    with pytest.raises(TargetError, match=rf"only {experts}, .* which take no LoRA"):
        run(model, data)
    with pytest.raises(TargetError, match=rf"{experts} is a MixtralExperts, which takes no LoRA"):
        run(model, data, modules=[experts])
    assert all(torch.equal(before[name], found) for name, found in model.state_dict().items())
    whole = mixtures.make("Mixtral")
    with pytest.raises(OptionError, match="trains compressed linear layers"):
        tnlm.compress(whole, "reap", keep_targets=0.75, recover="lora", **MIXED)
    assert whole.model.layers[0].mlp.experts.num_experts == 4
    attention = tnlm.compress(model, "svd", keep_targets=0.5, targets=["q_proj"], progress=False)
    healed = run(attention, data)
    assert layers(healed)
    assert torch.equal(before[f"{experts}.down_proj"], healed.state_dict()[f"{experts}.down_proj"])


def test_a_single_step_trains(compressed):
    model = compressed("llama", "svd", **SMALL)
    before = loss_of(model)
    run(model, with_labels(model, BATCHES[:1]), tokens=1)
    assert loss_of(model) < before


@pytest.mark.parametrize("scheme", ["rtn", "svd"])
def test_loras_train_beside_codes_and_stay(scheme, tiny_llama):
    model = tiny_llama(hidden_size=64)
    tnlm.compress(model, scheme, precision="int4", progress=False)
    codes = {name: b.clone() for name, b in model.named_buffers() if name.endswith("codes")}
    before = loss_of(model)
    run(model, with_labels(model, BATCHES), merge="adapter")
    assert loss_of(model) < before
    now = {name.replace(".base_layer", ""): b for name, b in model.named_buffers()}
    assert codes
    assert all(torch.equal(now[name], held) for name, held in codes.items())


def test_a_lora_merged_into_codes_moves_those_that_it_can(tiny_llama, tmp_path):
    model = tiny_llama(hidden_size=64)
    tnlm.compress(model, "rtn", precision="int8", progress=False)
    layer = model.get_submodule(UP)
    codes, scales, before = layer.codes.clone(), layer.scales.detach().clone(), loss_of(model)
    run(model, with_labels(model, BATCHES))
    assert loss_of(model) < before
    assert torch.equal(layer.scales, scales)
    assert not torch.equal(layer.codes, codes)
    tnlm.save(model, tmp_path / "saved")
    loaded = tnlm.load(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(model(IDS[:16][None]).logits, loaded(IDS[:16][None]).logits)


@pytest.fixture
def pair(make_model, compressed):
    """Make a dense model whose predictions are of some certainty, and a compressed one."""
    both = make_model("llama"), compressed("llama", "svd", **SMALL)
    head = torch.randn(both[0].lm_head.weight.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for model in both:
            model.lm_head.weight.copy_(head)
    return both


def varied(model):
    ids = torch.randint(3, 61, (2048,), generator=torch.Generator().manual_seed(4))
    return with_labels(model, token_batches(ids, max_length=32, batch_size=2))


def divergence(model, teacher):
    with torch.no_grad():
        goal = divergence_from(teacher)
        return sum(float(goal(model, batch)) for batch in varied(model))


def test_a_teacher_is_approached_and_left_as_it_is(pair):
    teacher, model = pair
    weights = copy.deepcopy(teacher.state_dict())
    before, training = divergence(model, teacher), teacher.training
    run(model, varied(model), teacher=teacher, tokens=8192, learning_rate=3e-3)
    assert divergence(model, teacher) < 0.9 * before
    assert teacher.training == training
    assert all(torch.equal(weights[name], each) for name, each in teacher.state_dict().items())


def test_a_correction_that_does_not_help_on_held_out_text_is_undone(pair, caplog):
    teacher, model = pair
    before = copy.deepcopy(model.state_dict())
    with caplog.at_level(logging.WARNING, "tnlm"):
        run(model, varied(model), teacher=teacher, learning_rate=0.1)
    assert "did not lower the loss" in caplog.text
    for name, each in model.state_dict().items():
        torch.testing.assert_close(each, before[name], rtol=1e-5, atol=1e-6)


def test_a_model_is_not_its_own_teacher(pair):
    with pytest.raises(OptionError, match="its own teacher"):
        run(pair[1], varied(pair[1]), teacher=pair[1])


def test_adapters_train_under_autocast(pair):
    teacher, model = pair
    before = divergence(model, teacher)
    with torch.autocast("cpu", torch.bfloat16):
        run(model, varied(model), teacher=teacher, tokens=8192, learning_rate=3e-3)
    assert divergence(model, teacher) < 0.9 * before


def test_the_report_of_a_loaded_model_is_healed_with_it(compressed, tmp_path):
    place = tnlm.save(compressed("llama", "svd", **SMALL), tmp_path / "model")
    loaded = tnlm.load(place)
    before = [layer.error for layer in tnlm.report(loaded).plan.layers]
    run(loaded, with_labels(loaded, BATCHES))
    assert tnlm.report(loaded).seconds["heal"] > 0.0
    after = [layer.error for layer in tnlm.report(loaded).plan.layers]
    assert all(error is None for error, old in zip(after, before, strict=True) if old is not None)
    again = tnlm.load(tnlm.save(loaded, tmp_path / "healed"))
    assert tnlm.report(again).plan == tnlm.report(loaded).plan


def test_a_loaded_model_is_saved_with_its_report(compressed, tmp_path):
    model = compressed("llama", "svd", keep_targets=0.5)
    first = tnlm.load(tnlm.save(model, tmp_path / "model"))
    again = tnlm.load(tnlm.save(first, tmp_path / "again"))
    assert tnlm.report(again).plan == tnlm.report(model).plan


def test_batches_without_a_mask_have_no_padding(compressed):
    data = with_labels(compressed("llama", "svd", **SMALL), BATCHES)
    bare = [{k: v for k, v in batch.items() if k != "attention_mask"} for batch in data]
    models = [run(compressed("llama", "svd", **SMALL), rows) for rows in (data, bare)]
    first, second = (dict(model.named_parameters()) for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
