"""REAP: which experts go, and that what stays is what the dense model does without them."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tnlm
from tests.targets.test_routing import KINDS, mixture
from tnlm.errors import ModelError, OptionError, TargetError
from tnlm.targets.routing import LOW

IDS = torch.arange(600).remainder(31).reshape(-1).roll(3)
DATA = {"calibration": IDS, "max_length": 20, "num_samples": 8, "progress": False}
X = torch.arange(20).unsqueeze(0) % 32


def by_hand(model, windows):
    """Return REAP's scores of the first block of a Mixtral, from the formula."""
    block = model.model.layers[0].mlp
    seen = []
    handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(windows)
    handle.remove()
    states = seen[0].flatten(0, 1).double()
    experts = copy.deepcopy(block.experts).double().requires_grad_(False)
    logits = states @ block.gate.weight.detach().double().T
    sums, counts = torch.zeros(8).double(), torch.zeros(8)
    for state, row in zip(states, logits, strict=True):
        best = row.softmax(0).topk(2)
        for gate, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
            up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
            first, second = (up @ state).chunk(2)
            output = down @ (torch.nn.functional.silu(first) * second)
            sums[expert] += float(gate * output.norm())
            counts[expert] += 1
    return sums / counts.clamp_min(1)


def test_the_experts_of_least_score_go():
    model = mixture("mixtral")
    dense = copy.deepcopy(model)
    tnlm.compress(model, "reap", keep_targets=0.5, **DATA)
    windows = tnlm.calibration.data.token_batches(IDS, None, num_samples=8, max_length=20, seed=0)
    scores = by_hand(dense, torch.cat([batch["input_ids"] for batch in windows]))
    kept = scores.topk(4).indices.sort().values.tolist()
    entries = model.hf_quantizer.quantization_config.modules
    assert entries["model.layers.0.mlp.experts"]["kept"] == kept
    assert entries["model.layers.0.mlp.gate"]["tensors"] == ["weight"]
    squares = scores.square()
    gone = 1 - squares[kept].sum() / squares.sum()
    assert tnlm.report(model).plan.layers[0].error == pytest.approx(gone.sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_acts_as_if_the_others_were_masked(kind):
    model = mixture(kind)
    dense = copy.deepcopy(model)
    tnlm.compress(model, "reap", keep_targets=0.6, **DATA)
    for name, entry in model.hf_quantizer.quantization_config.modules.items():
        gone = [row for row in range(8) if row not in entry["kept"]]
        assert len(gone) == 4
        if name.endswith("experts"):
            continue
        gate = dense.get_submodule(name)
        gate.__class__ = masking(type(gate))
        gate.low = gone
    with torch.no_grad():
        torch.testing.assert_close(model(X).logits, dense(X).logits)


def masking(kind):
    """Return a class of routers some of whose logits are as low as can be."""

    class Masking(kind):
        def forward(self, states):
            linear = torch.nn.functional.linear

            def low(x, weight, bias=None):
                logits = linear(x, weight, bias)
                logits[:, self.low] = LOW
                return logits

            torch.nn.functional.linear = low
            try:
                return super().forward(states)
            finally:
                torch.nn.functional.linear = linear

    return Masking


def same(found, expected):
    """Compare logits but for how files are aligned in memory, which rounding depends on."""
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_made_dense_it_is_the_same(kind, tmp_path):
    model = tnlm.compress(mixture(kind), "reap", keep_targets=0.5, **DATA)
    with torch.no_grad():
        logits = model(X).logits
        tnlm.save(model, tmp_path / "small")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
        kept = loaded.state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
        same(loaded(X).logits, logits)
        tnlm.save(loaded, tmp_path / "again")
        dense = tnlm.to_dense(loaded)
        same(dense(X).logits, logits)
        dense.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in dense.config.to_dict()
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        same(plain(X).logits, logits)
    assert plain.num_parameters() == model.num_parameters()


def test_the_budget_counts_experts_and_their_rows_of_the_router():
    model = mixture("mixtral")
    before = model.num_parameters()
    tnlm.compress(model, "reap", keep_targets=0.75, **DATA)
    plan = tnlm.report(model).plan
    assert plan.targets_before.params == 2 * 8 * (3 * 16 * 24 + 16)
    assert plan.targets_after.params == 0.75 * plan.targets_before.params
    assert model.num_parameters() == plan.model_after.params
    assert before - model.num_parameters() == 0.25 * plan.targets_before.params
    assert plan.model_after.macs == plan.model.macs  # a token meets as many experts


def test_as_many_experts_stay_as_a_token_meets(caplog):
    model = tnlm.compress(mixture("mixtral"), "reap", keep_targets=0.25, **DATA)
    assert model.model.layers[0].mlp.experts.num_experts == 2
    with pytest.raises(tnlm.errors.BudgetError, match="no matrix would shrink"):
        tnlm.compress(mixture("mixtral"), "reap", keep_targets=0.2, **DATA)


@pytest.mark.parametrize("targets", ["experts", ["experts"], ["experts", "q_proj"]])
@pytest.mark.parametrize("precision", ["int2", "auto"])
def test_with_a_precision_it_is_refused_before_work(targets, precision):
    model = mixture("mixtral")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=r"drops whole experts .* a second call") as refused:
        tnlm.compress(model, "reap", targets=targets, precision=precision, **DATA)
    assert f"precision={precision!r}" in str(refused.value)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_a_second_call_rounds_what_is_left():
    model = tnlm.compress(mixture("mixtral"), "reap", keep_targets=0.75, **DATA)
    tnlm.compress(model, "rtn", precision="int4", group=8, progress=False)
    layers = {layer.name: layer for layer in tnlm.report(model).plan.layers}
    assert layers["model.layers.0.self_attn.q_proj"].precision["bits"] == 4
    assert model.model.layers[0].mlp.experts.num_experts == 6


def test_blocks_that_keep_different_numbers_cannot_be_made_dense():
    model = mixture("mixtral")
    decided = tnlm.plan(model, "reap", keep_targets=0.5, **DATA)
    first, second = decided.layers
    changed = replace(decided, layers=(replace(first, spec={"experts": 6}), second))
    tnlm.compress(model, changed, **DATA)
    kept = [layer.mlp.experts.num_experts for layer in model.model.layers]
    assert kept == [6, 4]
    logits = model(X).logits
    with pytest.raises(ModelError, match=r"different numbers of experts \(4 of 8, 6 of 8\)"):
        tnlm.to_dense(model)
    assert torch.equal(model(X).logits, logits)


def test_it_trains_and_compiles():
    model = tnlm.compress(mixture("mixtral", num_hidden_layers=1), "reap", **DATA)
    model.train()
    model(input_ids=X, labels=X).loss.backward()
    experts, gate = model.model.layers[0].mlp.experts, model.model.layers[0].mlp.gate
    assert experts.gate_up_proj.grad.abs().sum() > 0
    assert gate.weight.grad.abs().sum() > 0
    model.eval()
    model.set_experts_implementation("grouped_mm")
    compiled = torch.compile(model.model.layers[0].mlp, backend="eager", fullgraph=True)
    states = torch.randn(1, 5, 16)
    torch.testing.assert_close(compiled(states), model.model.layers[0].mlp(states))


def test_a_model_without_experts_is_refused(tiny_llama):
    with pytest.raises(TargetError, match="no matrix matches targets='experts'"):
        tnlm.compress(tiny_llama(), "reap", **DATA)


def test_groups_are_refused_with_a_reason():
    model = mixture("deepseek_v3", n_group=4, topk_group=2)
    with pytest.raises(TargetError, match="no expert can be dropped"):
        tnlm.compress(model, "reap", **DATA)


def test_experts_that_no_token_reached_go_first():
    model = mixture("mixtral", num_hidden_layers=1)
    block, states = model.model.layers[0].mlp, []
    handle = block.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model(IDS.unsqueeze(0))
    handle.remove()
    with torch.no_grad():  # its logit is the least at every token
        block.gate.weight[5] = -10 * block.gate.weight.abs().sum(0)
        block.gate.weight[5, states[0].flatten(0, 1).mean(0) < 0] *= -1
    routed = set(block.gate(states[0].flatten(0, 1))[2].flatten().tolist())
    tnlm.compress(model, "reap", keep_targets=0.9, **DATA)
    entry = model.hf_quantizer.quantization_config.modules["model.layers.0.mlp.experts"]
    assert set(range(8)) - set(entry["kept"]) <= (set(range(8)) - routed or set(range(8)))


def test_what_weighs_experts_weighs_nothing_else(tiny_llama):
    for scheme, metric in (("svd", "reap"), ("reap", "identity"), ("reap", "two-sided")):
        with pytest.raises(OptionError, match="can be fitted"):
            tnlm.compress(tiny_llama(), scheme, metric=metric, **DATA)


def test_by_the_loss_blocks_keep_different_numbers_within_one_budget():
    model = mixture("mixtral")
    with torch.no_grad():  # experts of the second block do nothing
        model.model.layers[1].mlp.experts.down_proj.mul_(1e-3)
    tnlm.compress(model, "reap", metric="removal", allocation="loss", keep_targets=0.75, **DATA)
    plan = tnlm.report(model).plan
    assert plan.targets_after.params == 0.75 * plan.targets_before.params
    assert [layer.spec.get("experts", 8) for layer in plan.layers] == [8, 4]
    assert model(X).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", ["svd", "stack-tucker"])
def test_what_is_left_can_be_compressed(kind, scheme, tmp_path):
    model = mixture(kind)
    tnlm.compress(model, "reap", keep_targets=0.75, **DATA)
    smaller = sum(parameter.numel() for parameter in model.parameters())
    data = DATA if scheme == "stack-tucker" else {"progress": False}
    tnlm.compress(model, scheme, keep_targets=0.6, **data)
    plan = tnlm.report(model).plan
    assert plan.model.params == smaller
    assert plan.model_after.params == sum(parameter.numel() for parameter in model.parameters())
    entries = model.hf_quantizer.quantization_config.modules
    counts = [entry["experts"] for entry in entries.values() if entry["kind"] == "experts"]
    assert counts
    assert set(counts) == {6}
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(X).logits
        torch.testing.assert_close(loaded(X).logits, expected)
        for compressed in (model, loaded):
            dense = tnlm.to_dense(compressed)
            torch.testing.assert_close(dense(X).logits, expected, rtol=0, atol=1e-4)
            dense.save_pretrained(tmp_path / "dense")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
            torch.testing.assert_close(again(X).logits, expected, rtol=0, atol=1e-4)


def test_experts_are_dropped_once_and_before_all_else():
    model = mixture("mixtral")
    tnlm.compress(model, "reap", keep_targets=0.75, **DATA)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(TargetError, match="no matrix matches targets='experts'"):
        tnlm.compress(model, "reap", keep_targets=0.75, **DATA)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    tnlm.compress(model, "svd", keep_targets=0.6, progress=False)
    with pytest.raises(ModelError, match="compressed already"):
        tnlm.compress(model, "svd", keep_targets=0.6, progress=False)


def test_a_failure_leaves_the_dropped_model(monkeypatch):
    model = mixture("mixtral")
    tnlm.compress(model, "reap", keep_targets=0.75, **DATA)
    modules, entries = dict(model.named_modules()), model.hf_quantizer.quantization_config.modules

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr("tnlm.compression.pipeline.attach", fail)
    with pytest.raises(RuntimeError, match="stop"):
        tnlm.compress(model, "svd", keep_targets=0.6, progress=False)
    assert dict(model.named_modules()) == modules
    assert model.hf_quantizer.quantization_config.modules == entries


@pytest.mark.parametrize("then", [False, True])
def test_blocks_of_different_numbers_are_not_made_dense(then):
    model = mixture("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(1e-3)
    tnlm.compress(model, "reap", metric="removal", allocation="loss", keep_targets=0.75, **DATA)
    if then:
        tnlm.compress(model, "svd", keep_targets=0.6, progress=False)
    with pytest.raises(ModelError, match="does not say how many experts each block has"):
        tnlm.to_dense(model)
