from __future__ import annotations

import copy
import enum
import json
import math
import pickle
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import tnlm
from tests.conftest import PACKED, cover, one_each, short_training
from tnlm.allocation import get_allocation
from tnlm.checkpoint import transformers_plugin
from tnlm.compression import pipeline
from tnlm.compression.fitting import Fitting
from tnlm.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    OptionError,
    TargetError,
    TnlmError,
)
from tnlm.schemes import schemes
from tnlm.targets.selection import select

SCHEMES = tnlm.list_schemes()
LINEAR = [name for name in SCHEMES if schemes()[name].targets == "all-linear"]
TOLERANT = [
    name
    for name in LINEAR
    if get_allocation(schemes()[name].allocation).tolerates and schemes()[name].formats
]
WEIGHTS_ONLY = [n for n in LINEAR if not schemes()[n].needs_calibration and schemes()[n].formats]
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
SQUARE = {"targets": ["q_proj", "o_proj"]}
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}

PAIRS = cover("llama", "tied-llama", "gpt2", "masked-bert")

every_pair = pytest.mark.parametrize(("kind", "scheme"), PAIRS)
every_scheme = pytest.mark.parametrize(("kind", "scheme"), one_each(PAIRS))
every_tied_pair = pytest.mark.parametrize(
    ("kind", "scheme"), [pair for pair in PAIRS if pair[0] in ("tied-llama", "gpt2")]
)
every_causal_pair = pytest.mark.parametrize(
    ("kind", "scheme"), [pair for pair in PAIRS if pair[0] != "masked-bert"]
)


def data_for(scheme):
    return DATA | short_training(scheme) if schemes()[scheme].needs_calibration else {}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def count(model):
    return sum(p.numel() for p in model.parameters())  # counts shared ones once


def contents(model):
    """All that compression could touch, as values that compare."""
    named = list(model.named_parameters(remove_duplicate=False))
    values = {n: t.detach().numpy().tobytes() for n, t in model.state_dict().items()}
    modules = [(n, id(m), m.training, len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    return {
        "values": values,
        "parameters": [(n, id(p), p.dtype, p.shape, p.requires_grad) for n, p in named],
        "modules": modules,
        "attributes": sorted(vars(model)),
        "config": model.config.to_dict(),
        "ties": (model.all_tied_weights_keys, model._tied_weights_keys),
    }


def bias_was_added(model):
    """Tell whether some matrix has a bias that the dense model has no place for."""
    return any(layer.bias for layer in tnlm.report(model).plan.layers)


def step(model, ids=IDS, rate=0.05):
    """Take one optimizer step and return the loss before it and after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate)
    before = model(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    return before.item(), model(ids, labels=ids).loss.item()


# What is reported


@every_pair
def test_the_report_counts_what_the_model_holds(kind, scheme, compressed, make_model):
    dense, model = make_model(kind), compressed(kind, scheme)
    report = tnlm.report(model)
    assert report.parameters_before == count(dense)
    if scheme not in PACKED:
        assert report.parameters_after == count(model) < count(dense)
    held = ("_order", "codes", "zeros")
    others = sum(b.nbytes for n, b in model.named_buffers() if n.endswith(held))
    stored = sum(p.nbytes for p in model.parameters()) + others
    assert report.to_dict()["bytes_after"] == stored
    assert logits(model).shape == logits(dense).shape
    assert logits(model).isfinite().all()


@every_pair
def test_by_default_targets_shrink_to_four_fifths_without_more_work(kind, scheme, compressed):
    report = tnlm.report(compressed(kind, scheme))
    plan = report.plan
    unit = "bytes" if scheme in PACKED else "params"
    assert 0 < getattr(plan.targets_after, unit) <= 0.8 * getattr(plan.targets_before, unit)
    for layer in plan.layers:
        if schemes()[scheme].allocation == "uniform":
            assert getattr(layer.after, unit) <= 0.8 * getattr(layer.before, unit)
        if layer.kind != "embedding":
            assert layer.after.macs <= layer.before.macs


@every_pair
def test_reported_multiply_adds_are_those_of_a_forward_pass(kind, scheme, compressed, make_model):
    def flops(model):
        with FlopCounterMode(display=False) as counter:
            logits(model, one)
        return counter.get_total_flops()

    one = IDS[:1]  # positions are looked up once for all sequences
    dense, model = make_model(kind), compressed(kind, scheme)
    for module in model.modules():
        if hasattr(module, "crossing"):
            module.crossing = math.inf  # whether a rebuilt weight is faster, a machine decides
    plan = tnlm.report(model).plan
    # Rows of rank one are multiplied entry by entry, which the counter does not see.
    tables = [layer for layer in plan.layers if layer.kind == "embedding"]
    unseen = sum(layer.after.macs for layer in tables if layer.spec.get("rank") == 1)
    # A Kronecker table of one term: its rows are scaled entry by entry.
    unseen += sum(layer.shape[1] for layer in tables if layer.spec.get("terms") == 1)
    known = plan.targets_after.macs - plan.targets_before.macs - unseen
    more = 2 * one.numel() * known
    if scheme == "tensorgpt" and kind != "llama":
        # A tied head rebuilds its rows once for all tokens, which is the price of a single token.
        assert flops(model) - flops(dense) <= more
    else:
        assert flops(model) - flops(dense) == more


@every_scheme
def test_the_report_is_json_and_a_table(kind, scheme, compressed):
    report = tnlm.report(compressed(kind, scheme))
    record = json.loads(report.to_json())
    assert record["parameters_after"] == report.parameters_after
    assert record["bytes_before"] > record["bytes_after"]
    assert record["seconds"] >= 0
    assert record["scheme"] == scheme
    for layer in report.plan.layers:
        assert layer.name in str(report)
    assert "params" in str(report)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not schemes()[s].needs_calibration])
def test_reported_errors_are_those_of_the_stored_weights(scheme, compressed, make_model):
    dense, model = make_model("llama"), compressed("llama", scheme)
    for layer in tnlm.report(model).plan.layers:
        weight = dense.get_submodule(layer.name).weight
        error = (model.get_submodule(layer.name).weight - weight).norm() / weight.norm()
        assert layer.error == pytest.approx(error.item(), rel=1e-4)


def test_under_the_input_metric_the_error_is_that_of_the_outputs(make_model):
    dense, name, seen = make_model("llama"), "model.layers.1.mlp.down_proj", []
    hook = dense.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = DATA["calibration"].reshape(-1, 32)
    logits(dense, ids)
    hook.remove()
    weight = dense.get_submodule(name).weight.detach().clone()
    model = tnlm.compress(dense, "svd-llm", rank=8, targets=["1.mlp.down_proj"], **DATA)
    error = seen[0] @ (model.get_submodule(name).weight - weight).T
    [layer] = tnlm.report(model).plan.layers
    expected = (error.norm() / (seen[0] @ weight.T).norm()).item()
    assert layer.error == pytest.approx(expected, rel=1e-3)


def test_matrices_that_cannot_shrink_stay_dense_and_the_reason_is_given(make_model, caplog):
    model = make_model("llama")
    kept = model.model.layers[0].self_attn.q_proj
    # One column and one row of a 32x32 matrix are 63 numbers, more than 6 % of it.
    tnlm.compress(model, "svd", keep_targets=0.06, targets=["q_proj", "up_proj"])
    first, second, *_ = tnlm.report(model).plan.layers
    assert (first.format, first.keep, first.error) == (None, 1.0, None)
    assert first.note == "no low-rank of at most 61 parameters"
    assert second.spec["rank"] == 1
    assert model.model.layers[0].self_attn.q_proj is kept
    assert tnlm.report(model).parameters_after == count(model)
    assert "asked to keep 0.060 of the targets' params, achieved 0.431: 2 of 4" in caplog.text


def test_a_part_of_a_fused_module_may_stay_dense(make_model):
    model = make_model("gpt2")
    fused = model.transformer.h[0].attn.c_attn
    with torch.no_grad():  # of q, k and v, only k has low rank
        fused.weight[:, 32:64] = torch.outer(torch.randn(32), torch.randn(32))
    expected = logits(model)
    tnlm.compress(model, "svd", tolerance=1e-3, targets=["h.0.attn.c_attn"])
    made = model.transformer.h[0].attn.c_attn
    assert [type(getattr(made, part)).__name__ for part in "qkv"] == [
        "ArrangedLinear",
        "FactorizedLinear",
        "ArrangedLinear",
    ]
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)
    assert tnlm.report(model).parameters_after == count(model)
    torch.testing.assert_close(tnlm.to_dense(model)(IDS).logits, expected, rtol=1e-3, atol=1e-4)


# What is asked


@pytest.mark.parametrize("keep", [0.9, 0.55])
@pytest.mark.parametrize("scheme", ["svd", "kron"])
def test_keep_is_of_the_whole_model(scheme, keep, tiny_llama):
    model = tnlm.compress(tiny_llama(), scheme, keep=keep)
    dense = count(tiny_llama())
    assert keep - 0.1 < count(model) / dense <= keep
    record = tnlm.report(model).to_dict()
    assert record["request"] == {
        "keep": keep,
        "max_macs": 1.0,
        "unit": "params",
        "allocation": "uniform",
        "cascade": "none",
    }
    assert record["parameters_after"] / record["parameters_before"] == count(model) / dense


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.3])
@pytest.mark.parametrize("scheme", WEIGHTS_ONLY)
def test_keep_targets_is_of_the_targets(scheme, keep, tiny_llama):
    plan = tnlm.plan(tiny_llama(), scheme, keep_targets=keep, max_macs=10.0)
    assert keep - 0.15 < plan.targets_after.params / plan.targets_before.params <= keep


@pytest.mark.parametrize("tolerance", [0.8, 0.6])
@pytest.mark.parametrize("scheme", TOLERANT)
def test_tolerance_holds_for_every_matrix(scheme, tolerance, tiny_llama):
    model = tnlm.compress(
        tiny_llama(), scheme, tolerance=tolerance, max_macs=10.0, **data_for(scheme)
    )
    report = tnlm.report(model)
    assert all(layer.error <= tolerance + 1e-9 for layer in report.plan.layers)
    assert report.parameters_after == count(model)


def test_a_larger_tolerance_keeps_less(tiny_llama):
    kept = [tnlm.plan(tiny_llama(), "svd", tolerance=t).targets_after.params for t in (0.7, 0.5)]
    assert kept[0] < kept[1]


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("svd", {"rank": 5}),
        ("svd", {"rank": 5, "gauge": False}),
        ("kron", {"terms": 3}),
        ("kron", {"terms": 2, "out_split": [4, 8], "in_split": [8, 4]}),
        ("tt", {"ranks": [3]}),
        ("tt", {"out_split": [2, 4, 4], "in_split": [4, 4, 2], "ranks": [3, 5]}),
        ("tucker", {"out_split": [4, 8], "in_split": [32], "ranks": [3, 5, 7]}),
    ],
)
def test_options_are_used_as_given(scheme, options, tiny_llama):
    model = tnlm.compress(
        tiny_llama(), scheme, targets=["q_proj", "o_proj"], max_macs=9.0, **options
    )
    for layer in tnlm.report(model).plan.layers:
        assert layer.spec.items() >= options.items()


def test_rank_is_the_size_of_the_inner_layer(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", rank=5, gauge=False)
    for block in model.model.layers:
        assert block.self_attn.k_proj.right.out_features == 5
        assert block.self_attn.k_proj.left.weight.shape == (16, 5)


def test_terms_alone_choose_splits_for_every_shape(tiny_llama):
    model = tnlm.compress(tiny_llama(), "kron", terms=4)
    layers = tnlm.report(model).plan.layers
    assert len({(tuple(la.spec["out_split"]), tuple(la.spec["in_split"])) for la in layers}) > 2
    for layer in layers:
        assert layer.spec["terms"] == 4
        assert layer.keep <= 0.8
        assert layer.after.macs <= layer.before.macs
        assert layer.error < 1


@pytest.mark.parametrize("max_macs", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scheme", WEIGHTS_ONLY)
def test_multiply_adds_stay_within_what_is_allowed(scheme, max_macs, tiny_llama):
    plan = tnlm.plan(tiny_llama(), scheme, max_macs=max_macs)
    replaced = [layer for layer in plan.layers if layer.format is not None]
    assert all(layer.after.macs <= max_macs * layer.before.macs for layer in replaced)


@pytest.mark.parametrize(
    ("kind", "scheme", "options"),
    [
        ("llama", "svd", {"rank": 7}),
        ("gpt2", "svd", {"rank": 7}),
        ("llama", "svd-llm", {"rank": 7, **DATA}),
        ("llama", "kron", {"terms": 3, "out_split": [4, 8], "in_split": [8, 4], **SQUARE}),
        ("llama", "kron", {"terms": 2, "out_split": [4, 8], "in_split": [4, 8], **SQUARE}),
    ],
)
def test_gauge_changes_what_is_stored_and_not_what_is_computed(kind, scheme, options, make_model):
    fixed, plain = (
        tnlm.compress(make_model(kind).double(), scheme, gauge=gauge, **options)
        for gauge in (True, False)
    )
    torch.testing.assert_close(logits(fixed), logits(plain), rtol=1e-9, atol=1e-9)
    assert count(fixed) < count(plain)


def test_a_scheme_may_be_given_another_metric_and_other_targets(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", metric="input", targets=["up_proj"], **DATA)
    report = tnlm.report(model)
    assert report.plan.metric == "input"
    assert report.tokens == 256
    assert [layer.name[-7:] for layer in report.plan.layers] == ["up_proj", "up_proj"]


def test_embeddings_and_linears_go_together(tiny_llama):
    model = tnlm.compress(tiny_llama(), "svd", targets=["all-linear", "embeddings", "lm_head"])
    assert len(tnlm.report(model).plan.layers) == 16
    assert tnlm.report(model).parameters_after == count(model)


def test_what_the_format_cannot_replace_is_skipped_with_the_reason(tiny_llama):
    model = tnlm.compress(tiny_llama(), "tt", targets=["embeddings", "up_proj"])
    plan = tnlm.report(model).plan
    assert plan.skipped == {"model.embed_tokens": "tensor-train replaces only linear"}
    assert "skipped: model.embed_tokens: tensor-train" in str(plan)
    with pytest.raises(TargetError, match="only embedding"):
        tnlm.compress(tiny_llama(), "tensorgpt", targets="all-linear")


# What the model is afterwards


@every_pair
def test_dense_again_it_computes_the_same(kind, scheme, compressed, make_model):
    model = compressed(kind, scheme)
    expected = logits(model)
    if bias_was_added(model):
        with pytest.raises(ModelError, match="no place for the bias that was added to"):
            tnlm.to_dense(model)
        assert torch.equal(logits(model), expected)
        return
    dense = tnlm.to_dense(model)
    assert [type(m) for m in dense.modules()] == [type(m) for m in make_model(kind).modules()]
    assert count(dense) == count(make_model(kind))
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


@every_tied_pair
def test_ties_survive(kind, scheme, compressed):
    model = compressed(kind, scheme)
    shared = [
        {id(p) for p in module.parameters()}
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    assert shared[0] == shared[1]
    model.tie_weights()
    assert scheme in PACKED or tnlm.report(model).parameters_after == count(model)
    if bias_was_added(model):
        return
    dense = tnlm.to_dense(model)
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight


def test_biases_are_the_parameters_they_were(make_model):
    model = make_model("masked-bert")
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    tnlm.compress(model, "svd", targets=["all-linear", "cls.predictions.decoder"])
    assert {n: p for n, p in model.named_parameters() if n.endswith("bias")}.keys() == biases.keys()
    assert all(dict(model.named_parameters())[name] is p for name, p in biases.items())
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@every_scheme
def test_bfloat16_stays(kind, scheme, make_model):
    model = make_model(kind).to(torch.bfloat16)
    tnlm.compress(model, scheme, **data_for(scheme))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kind", "scheme"), [("tied-llama", "albert"), ("gpt2", "svd-llm")])
def test_the_training_flag_and_frozen_weights_stay(kind, scheme, training, make_model):
    model = make_model(kind).train(training)
    frozen = model.get_input_embeddings() if scheme == "albert" else model.transformer.h[0]
    frozen.requires_grad_(False)
    tnlm.compress(model, scheme, **data_for(scheme))
    assert all(module.training == training for module in model.modules())
    frozen = model.get_input_embeddings() if scheme == "albert" else model.transformer.h[0]
    fixed = {id(p) for p in frozen.parameters()}
    assert all(p.requires_grad == (id(p) not in fixed) for p in model.parameters())
    dense = tnlm.to_dense(model)
    assert all(module.training == training for module in dense.modules())
    assert 0 < sum(not p.requires_grad for p in dense.parameters()) < 20


@every_causal_pair
def test_generation_is_that_of_the_dense_form(kind, scheme, compressed):
    model = compressed(kind, scheme)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    made = model.generate(IDS[:1], **options)
    assert made.shape == (1, 16)
    if bias_was_added(model):
        return
    assert torch.equal(made, tnlm.to_dense(model).generate(IDS[:1], **options))


@every_pair
def test_gradients_reach_every_factor_and_a_step_lowers_the_loss(kind, scheme, compressed):
    model = compressed(kind, scheme).train()
    if kind in ("gpt2", "masked-bert"):
        model.eval()  # without dropout the losses compare
    before, after = step(model)
    assert after < before
    unused = "pooler", "position_embeddings", "wpe", "embed"
    for name, parameter in model.named_parameters():
        if not any(word in name for word in unused):
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("kind", "scheme"), [("gpt2", "svd"), ("tied-llama", "tensorgpt")])
def test_copies_and_pickles_are_the_same_model(kind, scheme, duplicate, compressed, tmp_path):
    model = compressed(kind, scheme)
    other = duplicate(model)
    assert torch.equal(logits(other), logits(model))
    assert count(other) == count(model)
    assert tnlm.report(other) == tnlm.report(model)
    step(other)
    assert not torch.equal(logits(other), logits(model))
    other.save_pretrained(tmp_path)  # ties and entries came along


# Not ours: transformers warns about its own names when it enables adapters.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("svd", {}),
        ("svd-llm", {}),
        ("kron", {}),
        ("kron", {"terms": 6, "max_macs": 9.0}),  # many tokens take the rebuilt weight
        ("tt", {}),
        ("tucker", {}),
    ],
)
def test_lora_trains_on_every_factor_and_merges(scheme, options, compressed):
    model = compressed("llama", scheme, **options).double()  # merging is exact but for rounding
    factors = {name for m in model.modules() if hasattr(m, "chain") for name in m.chain.order}
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=sorted(factors), init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    # Random adapters make the loss steep: a step that is not short may overshoot.
    before, after = step(adapted, rate=0.0005)
    assert after < before
    for name, parameter in adapted.named_parameters():
        assert not parameter.requires_grad or parameter.grad.any(), name
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-9, atol=1e-10)
    assert count(merged) == tnlm.report(merged).parameters_after


def test_a_model_made_dense_can_be_compressed_again(compressed):
    model = tnlm.to_dense(compressed("gpt2", "svd"))
    with pytest.raises(ModelError, match="not compressed in this process"):
        tnlm.report(model)
    tnlm.compress(model, "kron", terms=2)
    assert tnlm.report(model).plan.scheme == "kron"


# Plans


@every_scheme
def test_a_plan_is_what_compress_does(kind, scheme, compressed, make_model):
    model = make_model(kind)
    before = contents(model)
    plan = tnlm.plan(model, scheme, **data_for(scheme))
    assert contents(model) == before
    done = tnlm.report(compressed(kind, scheme)).plan
    assert (plan.targets_after, plan.model_after) == (done.targets_after, done.model_after)
    assert [la.spec for la in plan.layers] == [la.spec for la in done.layers]
    if schemes()[scheme].cascade != "none":  # fitted to inputs that are not known before
        return
    for planned, fitted in zip(plan.layers, done.layers, strict=True):
        if planned.precision is not None:  # rounding is predicted for a choice alone
            continue
        # A prediction may be an upper bound (HOSVD, a start) or come from a sample of the rows.
        bound = 0.25 if scheme == "tfwsvd" else 0.05
        assert (planned.error or 0.0) == pytest.approx(fitted.error or 0.0, rel=bound)


@every_scheme
def test_a_plan_from_json_gives_the_same_model(kind, scheme, compressed, make_model):
    plan = tnlm.plan(make_model(kind), scheme, **data_for(scheme))
    again = tnlm.Plan.from_json(plan.to_json())
    assert again == plan
    data = DATA if schemes()[scheme].needs_calibration else {}
    model, same = tnlm.compress(make_model(kind), again, **data), compressed(kind, scheme)
    assert torch.equal(logits(model), logits(same))
    assert tnlm.report(model).to_dict().keys() == tnlm.report(same).to_dict().keys()


# What repeats


def test_the_seed_draws_the_windows(tiny_llama, word_tokenizer, word_text):
    def run(seed):
        data = {"calibration": [word_text(400)], "tokenizer": word_tokenizer, "max_length": 16}
        model = tnlm.compress(tiny_llama(), "svd-llm", rank=6, num_samples=8, seed=seed, **data)
        assert tnlm.report(model).tokens == 128
        return logits(model)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


@every_scheme
def test_results_repeat_and_leave_the_random_state_alone(kind, scheme, compressed, make_model):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = make_model(kind)
    torch.set_rng_state(state)
    tnlm.compress(model, scheme, **data_for(scheme))
    assert torch.equal(torch.get_rng_state(), state)
    for (name, old), new in zip(
        compressed(kind, scheme).state_dict().items(),
        model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(old, new), name


@pytest.mark.parametrize("scheme", [n for n in SCHEMES if schemes()[n].targets != "experts"])
def test_results_do_not_hang_on_the_number_of_threads(scheme, make_model):
    def run():
        # One matrix of each kind: LAPACK's threads are slow on tiny ones.
        targets = ["1.mlp.down_proj"] if scheme in LINEAR else None
        return logits(
            tnlm.compress(make_model("llama"), scheme, targets=targets, **data_for(scheme))
        )

    threads, expected = torch.get_num_threads(), run()
    torch.set_num_threads(threads + 1)
    try:
        torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


# What fails leaves the model as it was


def fail_after(monkeypatch, name, matches, error):
    """Let one step of compression fail after its work is done."""
    where = {"retie": transformers_plugin, "put": Fitting}.get(name, pipeline)
    real = getattr(where, name)

    def failing(*args):
        done = real(*args)
        if matches(args):
            raise error
        return done

    monkeypatch.setattr(where, name, failing)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("put", RuntimeError("no memory")),
        ("put", KeyboardInterrupt()),
        ("install", OSError("disk full")),
        ("install", KeyboardInterrupt()),
        ("retie", KeyboardInterrupt()),
    ],
)
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2", "masked-bert"])
def test_a_failure_at_the_end_leaves_the_model_bit_for_bit(
    kind, function, error, make_model, monkeypatch
):
    model = make_model(kind)
    targets = ["embeddings", "down_proj", "c_attn", "attention.output.dense"]
    asked = {"targets": targets, "keep_targets": 0.5}
    last = select(model, asked["targets"]).targets[-1]
    matches = {
        "put": lambda args: args[1] == last,
        "install": lambda args: last in args[2],
        "retie": lambda args: True,
    }
    before, expected = contents(model), logits(model)
    fail_after(monkeypatch, function, matches[function], error)
    with pytest.raises(type(error)) as caught:
        tnlm.compress(model, "svd", **asked)
    assert caught.value is error  # and not another one, raised by mistake
    assert contents(model) == before
    assert torch.equal(logits(model), expected)
    monkeypatch.undo()
    assert count(tnlm.compress(model, "svd", **asked)) < count(make_model(kind))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("call", [tnlm.compress, tnlm.plan])
def test_weights_that_are_not_finite_are_refused(bad, call, make_model):
    model = make_model("gpt2")
    model.transformer.h[1].mlp.c_fc.weight.data[0, 0] = bad
    before = contents(model)
    with pytest.raises(ModelError, match=r"h\.1\.mlp\.c_fc holds 1 NaN or infinite"):
        call(model, "svd")
    assert contents(model) == before


def test_a_compressed_model_is_refused(compressed):
    model = compressed("llama", "svd")
    for call in (tnlm.compress, tnlm.plan):
        with pytest.raises(ModelError, match=r"compressed already; start from tnlm\.to_dense"):
            call(model, "svd")


def test_a_quantized_model_is_refused(make_model):
    method = enum.Enum("Method", {"BITS": "bitsandbytes"})
    model = make_model("llama")
    model.hf_quantizer = SimpleNamespace(
        quantization_config=SimpleNamespace(quant_method=method.BITS)
    )
    with pytest.raises(ModelError, match="quantized with bitsandbytes; load it unquantized"):
        tnlm.compress(model, "svd")


@pytest.mark.parametrize(
    ("scheme", "arguments", "error", "message"),
    [
        ("svd", DATA, OptionError, "calibration= has no effect on scheme 'svd'"),
        ("svd-llm", {**DATA, "metric": "identity"}, OptionError, "has no effect"),
        ("svd", {"cache_dir": "cache"}, OptionError, "cache_dir= has no effect on scheme 'svd'"),
        ("svd-llm", {}, CalibrationError, "needs data; pass calibration="),
        ("svd", {"metric": "input"}, CalibrationError, "needs data; pass calibration="),
        ("svd", {"recover": "lora"}, CalibrationError, "trains on data; pass training="),
        ("svd-llm", {"calibration": []}, CalibrationError, "no tokens"),
        ("svd-llm", {"calibration": [3, 4, 5]}, CalibrationError, "fewer than one window"),
        ("svd-llm", {"calibration": ["word1"]}, CalibrationError, "tokenizer="),
        ("svd", {"rank": 4, "keep_targets": 0.01}, BudgetError, "no matrix would shrink"),
        ("kron", {"terms": 16, "targets": ["k_proj"]}, BudgetError, "no matrix would shrink"),
        ("svd", {"keep": 0.01}, BudgetError, "smallest possible is keep="),
        ("svd", {"targets": "nothing"}, TargetError, "no matrix matches"),
        ("svd", {"keep": 0.5, "keep_targets": 0.5}, BudgetError, "allowed: one of"),
        ("svd", {"ranks": [4]}, OptionError, "did you mean 'rank'"),
        ("swd", {}, OptionError, "did you mean 'svd'"),
    ],
)
def test_bad_requests_are_errors_that_change_nothing(scheme, arguments, error, message, make_model):
    model = make_model("tied-llama").train()
    before = contents(model)
    for call in (tnlm.compress, tnlm.plan):
        with pytest.raises(error, match=message) as caught:
            call(model, scheme, **arguments)
        assert isinstance(caught.value, TnlmError)
        assert contents(model) == before


def test_a_plan_is_given_alone(make_model):
    plan = tnlm.plan(make_model("llama"), "svd", rank=4)
    for arguments in ({"keep": 0.5}, {"targets": ["q_proj"]}, {"rank": 3}, {"max_macs": 2.0}):
        with pytest.raises(OptionError, match="give it alone"):
            tnlm.compress(make_model("llama"), plan, **arguments)


@pytest.mark.parametrize("sizes", [{"num_hidden_layers": 1}, {"intermediate_size": 40}])
def test_a_plan_for_another_model_is_refused(sizes, tiny_llama):
    plan = tnlm.plan(tiny_llama(), "svd", rank=4)
    model = tiny_llama(**sizes)
    before = contents(model)
    with pytest.raises(TargetError, match=r"the plan has model\.layers\.\d\.\S+ of \(\d+, \d+\)"):
        tnlm.compress(model, plan)
    assert contents(model) == before


def test_dense_models_have_nothing_to_report_or_undo(make_model):
    with pytest.raises(ModelError, match="not compressed in this process"):
        tnlm.report(make_model("llama"))
    with pytest.raises(ModelError, match="not compressed by tnlm"):
        tnlm.to_dense(make_model("llama"))


def test_progress_goes_to_the_error_stream(make_model, capsys):
    tnlm.compress(make_model("llama"), "svd-llm", targets=["q_proj"], progress=True, **DATA)
    shown = capsys.readouterr()
    assert all(word in shown.err for word in ("calibrating", "planning", "fitting"))
    assert shown.out == ""


def _with_lora(model):
    return get_peft_model(model, tnlm.adaptable(LoraConfig(target_modules=["q_proj"], r=2)))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("part", [lambda whole: whole, lambda whole: whole.base_model.model])
def test_a_compressed_model_within_adapters_is_not_saved_without_them(part, tiny_llama, tmp_path):
    model = part(_with_lora(tnlm.compress(tiny_llama(), "svd", rank=4, progress=False)))
    with pytest.raises(ModelError, match="PEFT adapter"):
        tnlm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError, match="PEFT adapter"):
        tnlm.to_dense(model)


def test_a_weight_that_is_computed_is_passed_over(tiny_llama):
    model = tiny_llama()
    torch.nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.up_proj)
    tnlm.compress(model, "svd", rank=4, progress=False)
    assert "computes its weight" in tnlm.report(model).plan.skipped["model.layers.0.mlp.up_proj"]


def test_weights_of_eight_bits_are_refused(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.to(torch.float8_e4m3fn)
    with pytest.raises(ModelError, match="float8_e4m3fn; load the model unquantized"):
        tnlm.compress(model, "svd", rank=4, progress=False)


def test_a_table_resized_in_inference_mode_can_be_trained(tiny_llama):
    model = tnlm.compress(tiny_llama(), "tensorgpt", keep_targets=0.9, progress=False)
    with torch.inference_mode():
        model.resize_token_embeddings(70)
    ids = torch.tensor([[3, 4, 69]])
    model(ids, labels=ids).loss.backward()


def test_a_table_is_not_cut_to_fewer_rows_than_a_checkpoint_can_hold(tiny_llama):
    model = tnlm.compress(
        tiny_llama(), "svd", targets="embeddings", keep_targets=0.6, progress=False
    )
    with pytest.raises(TnlmError, match="cannot have 12 rows"):
        model.resize_token_embeddings(12)
    assert model.get_input_embeddings().num_embeddings == 64


def test_a_loaded_model_has_the_report_that_was_saved_beside_it(compressed, tmp_path):
    model = compressed("llama", "svd", keep_targets=0.5)
    folder = tnlm.save(model, tmp_path / "small")
    for loaded in (tnlm.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert tnlm.report(loaded).to_dict() == tnlm.report(folder).to_dict()
    (folder / "tnlm_report.json").unlink()
    assert tnlm.report(loaded).plan.scheme == "svd"  # read with the model
    loaded = tnlm.load(folder)
    with pytest.raises(ModelError, match="nor loaded from a directory with a report"):
        tnlm.report(loaded)
