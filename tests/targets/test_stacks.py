from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open

import tnlm
from tnlm.errors import CheckpointError, OptionError, TargetError
from tnlm.targets.matrix import MatrixTarget
from tnlm.targets.selection import select
from tnlm.targets.stacks import Stack, stack, ties
from tnlm.targets.table import TableTarget

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
KINDS = ["llama", "tied-llama", "gpt2", "masked-bert"]
SHARED = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]

every_kind = pytest.mark.parametrize("kind", KINDS)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def count(model):
    return sum(p.numel() for p in model.parameters())


def moment_of(model, name):
    """The second moment of a module's inputs on the calibration data."""
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    logits(model, DATA["calibration"].reshape(-1, 32))
    hook.remove()
    x = seen[0].flatten(0, 1).double()
    return x.T @ x / len(x)


def block(layer, name, shape=(8, 4)):
    return MatrixTarget(f"h.{layer}.{name}", f"h.{layer}.{name}", shape)


# Which matrices are stacked


@pytest.mark.parametrize(
    ("layers", "blocks", "expected"),
    [
        (4, 2, [(0, 1), (2, 3)]),
        (5, 2, [(0, 1), (2, 3), (4,)]),
        (5, 3, [(0, 1, 2), (3, 4)]),
        (2, 8, [(0, 1)]),
        (3, 1, [(0,), (1,), (2,)]),
    ],
)
def test_consecutive_blocks_are_stacked_and_the_last_may_be_short(layers, blocks, expected):
    units = stack([block(i, "up") for i in range(layers)], blocks)
    names = ["+".join(f"h.{i}.up" for i in group) for group in expected]
    assert [unit.name for unit in units] == names
    for unit, group in zip(units, expected, strict=True):
        assert unit.shape == (8 * len(group), 4)
        assert len(unit.members) == len(group)
        assert isinstance(unit, Stack) == (len(group) > 1)


def test_what_cannot_share_stays_by_itself():
    alone = [
        block(0, "mlp.down_proj"),
        block(1, "mlp.down_proj"),  # writes to the residual stream
        block(0, "up", (8, 4)),
        block(1, "up", (6, 4)),  # another shape
        TableTarget("embed", "embed", (8, 4)),
        MatrixTarget("lm_head", "lm_head", (8, 4)),
    ]
    assert stack(alone, 2) == alone
    apart = [block(1, "up"), block(2, "up")]  # neighbours, of different pairs
    assert stack(apart, 2) == apart


def test_stacks_keep_the_order_of_the_model_and_read_its_weights(make_model):
    model = make_model("gpt2")
    units = stack(select(model).targets, 2)
    fused = "transformer.h.{}.attn.c_attn.{}"
    assert [unit.name for unit in units[:3]] == [
        f"{fused.format(0, part)}+{fused.format(1, part)}" for part in "qkv"
    ]
    members = units[1].members
    assert torch.equal(units[1].weight(model), torch.cat([m.weight(model) for m in members]))
    assert units[1].bias(model) is None
    assert ties(units[1]) == {
        "transformer.h.1.attn.c_attn.k.right.weight": "transformer.h.0.attn.c_attn.k.right.weight"
    }


def test_blocks_of_experts_are_not_mixed_up():
    experts = [block(i, f"experts.{j}.up") for i in range(2) for j in range(2)]
    assert [unit.name for unit in stack(experts, 2)] == [
        f"h.0.experts.{j}.up+h.1.experts.{j}.up" for j in range(2)
    ]


# What a fit gives


@every_kind
def test_a_shared_factor_is_one_parameter_and_counted_once(kind, compressed, make_model):
    model, dense = compressed(kind, "basis-sharing"), make_model(kind)
    report = tnlm.report(model)
    assert report.parameters_after == count(model) < count(dense) == report.parameters_before
    stacked = [layer for layer in report.plan.layers if "+" in layer.name]
    assert stacked
    for layer in stacked:
        rows, columns = layer.shape
        rank = layer.spec["rank"]
        assert layer.after.params == rank * columns + rows * rank  # sum of m_i is rows
        assert layer.after.macs == 2 * rank * columns + rows * rank
        first, second = (model.get_submodule(name) for name in layer.name.split("+"))
        assert first.right.weight is second.right.weight
        assert first.left.weight.shape == second.left.weight.shape == (rows // 2, rank)
    if kind == "llama":
        assert {layer.name.rpartition(".")[2] for layer in stacked} == set(SHARED)


@pytest.mark.parametrize("name", ["self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_the_fit_is_the_truncated_svd_of_the_stacked_whitened_matrix(name, make_model):
    dense, rank = make_model("llama"), 9
    names = [f"model.layers.{i}.{name}" for i in range(2)]
    weight = torch.cat([dense.get_submodule(n).weight for n in names]).detach().double()
    moment = sum(moment_of(dense, n) for n in names) / 2
    moment = moment + 1e-6 * moment.diagonal().mean() * torch.eye(len(moment))
    values, vectors = torch.linalg.eigh(moment)
    root, inverse = (vectors * values**power @ vectors.T for power in (0.5, -0.5))
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank] @ inverse
    model = tnlm.compress(dense, "basis-sharing", targets=[name], rank=rank, max_macs=9.0, **DATA)
    made = torch.cat([model.get_submodule(n).weight for n in names])
    torch.testing.assert_close(made.detach().double(), best, atol=2e-4, rtol=1e-3)
    [layer] = tnlm.report(model).plan.layers
    expected = float((s[rank:].square().sum() / s.square().sum()).sqrt())
    assert layer.error == pytest.approx(expected, rel=1e-3)


def test_at_full_rank_the_function_stays(make_model):
    model = make_model("llama")
    with torch.no_grad():  # matrices of both blocks read the same few directions
        for name in ("q_proj", "k_proj"):
            basis = torch.randn(6, 32) / 6
            for layer in model.model.layers:
                weight = getattr(layer.self_attn, name).weight
                weight.copy_(torch.randn(len(weight), 6) @ basis)
    expected = logits(model)
    tnlm.compress(model, "basis-sharing", targets=["q_proj", "k_proj"], rank=6, **DATA)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_an_odd_block_is_fitted_alone(tiny_llama):
    model = tnlm.compress(tiny_llama(num_hidden_layers=3), "basis-sharing", **DATA)
    layers = {layer.name: layer for layer in tnlm.report(model).plan.layers}
    assert "model.layers.2.mlp.up_proj" in layers
    assert "model.layers.0.mlp.up_proj+model.layers.1.mlp.up_proj" in layers
    assert layers["model.layers.2.mlp.up_proj"].spec["gauge"]
    assert tnlm.report(model).parameters_after == count(model)
    last = model.model.layers[2].mlp.up_proj
    assert last.right.weight is not model.model.layers[1].mlp.up_proj.right.weight


def test_three_blocks_may_share(tiny_llama):
    model = tnlm.compress(
        tiny_llama(num_hidden_layers=3), "svd-llm", share=3, targets=SHARED, rank=5, **DATA
    )
    rights = {id(layer.mlp.up_proj.right.weight) for layer in model.model.layers}
    assert len(rights) == 1
    assert tnlm.report(model).parameters_after == count(model)


def test_a_failure_leaves_the_model(make_model, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    model = make_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("tnlm.compression.pipeline.attach", fail)  # when factors are tied already
    with pytest.raises(KeyboardInterrupt):
        tnlm.compress(model, "basis-sharing", **DATA)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


# Afterwards


@every_kind
def test_a_file_holds_a_shared_factor_once_and_loading_ties_it(kind, compressed, tmp_path):
    model = compressed(kind, "basis-sharing")
    directory = tnlm.save(model, tmp_path / "model")
    with safe_open(directory / "model.safetensors", framework="pt") as tensors:
        stored = set(tensors.keys())
    pairs = model.config.quantization_config.tied
    shared = {a: b for a, b in pairs.items() if a.endswith(".right.weight")}
    assert shared
    assert len(stored & {*shared, *shared.values()}) == len(shared)
    loaded = tnlm.load(directory)
    assert torch.equal(logits(loaded), logits(model))
    assert count(loaded) == count(model)
    for target, source in shared.items():
        assert loaded.get_parameter(target) is loaded.get_parameter(source)
    again = tnlm.save(loaded, tmp_path / "again")
    files = [(d / "model.safetensors").read_bytes() for d in (directory, again)]
    assert files[0] == files[1]


def test_shards_may_part_what_is_shared(compressed, tmp_path):
    model = compressed("llama", "basis-sharing")
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model", max_shard_size="10KB"))
    assert torch.equal(logits(loaded), logits(model))
    assert count(loaded) == count(model)


@pytest.mark.parametrize("change", [{"rank": 33}, {"rank": 10**12}, {"rank": 0}])
def test_a_shared_entry_of_an_impossible_rank_is_an_error(change, compressed, tmp_path):
    directory = tnlm.save(compressed("llama", "basis-sharing"), tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    modules["model.layers.0.mlp.up_proj"]["options"].update(change)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="up_proj"):
        tnlm.load(directory)


@every_kind
def test_dense_again_it_computes_the_same(kind, compressed, make_model):
    model, plain = compressed(kind, "basis-sharing"), make_model(kind)
    expected = logits(model)
    dense = tnlm.to_dense(model)
    assert [type(m) for m in dense.modules()] == [type(m) for m in plain.modules()]
    assert count(dense) == count(plain)
    assert dense.all_tied_weights_keys == plain.all_tied_weights_keys
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_plan_from_json_gives_the_same_model(kind, compressed, make_model):
    plan = tnlm.plan(make_model(kind), "basis-sharing", **DATA)
    again = tnlm.Plan.from_json(plan.to_json())
    assert again == plan
    model = tnlm.compress(make_model(kind), again, **DATA)
    assert torch.equal(logits(model), logits(compressed(kind, "basis-sharing")))
    assert tnlm.report(model).parameters_after == count(model)


@pytest.mark.parametrize("spec", [{"rank": 4}, {"rank": 65, "gauge": False}])
def test_a_plan_with_an_impossible_spec_for_a_stack_names_it(spec, make_model):
    plan = tnlm.plan(make_model("llama"), "basis-sharing", targets=["up_proj"], **DATA)
    layers = tuple(dataclasses.replace(layer, spec=spec) for layer in plan.layers)
    with pytest.raises(OptionError, match=r"up_proj\+model"):
        tnlm.compress(make_model("llama"), dataclasses.replace(plan, layers=layers), **DATA)


def test_a_plan_with_stacks_of_another_model_is_refused(tiny_llama):
    plan = tnlm.plan(tiny_llama(), "basis-sharing", targets=["up_proj"], **DATA)
    with pytest.raises(TargetError, match="the plan has"):
        tnlm.compress(tiny_llama(num_hidden_layers=1), plan, **DATA)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_gradients_of_all_members_meet_in_the_one_factor(kind, compressed):
    model = compressed(kind, "basis-sharing")
    apart = compressed(kind, "basis-sharing")
    pairs = model.config.quantization_config.tied
    shared = {a: b for a, b in pairs.items() if a.endswith(".right.weight")}
    for target in shared:
        owner = apart.get_submodule(target.removesuffix(".weight"))
        owner.weight = torch.nn.Parameter(owner.weight.detach().clone())
    for one in (model, apart):
        one(IDS, labels=IDS).loss.backward()
    for target, source in shared.items():
        parts = apart.get_parameter(target).grad + apart.get_parameter(source).grad
        assert apart.get_parameter(target).grad.any()
        torch.testing.assert_close(model.get_parameter(source).grad, parts, rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = logits(model)
    optimizer.step()
    assert not torch.equal(logits(model), before)
    assert all(model.get_parameter(a) is model.get_parameter(b) for a, b in shared.items())


# Not ours: transformers warns about its own names when it enables adapters.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_trains_on_it_and_merges_into_the_factors_of_its_own(compressed):
    model = compressed("llama", "basis-sharing")
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["left"], init_lora_weights=False)
    adapted = get_peft_model(model, lora)
    adapted(IDS, labels=IDS).loss.backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad.any() for p in trained)
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert count(merged) == tnlm.report(merged).parameters_after
    layers = merged.model.layers
    assert layers[0].mlp.up_proj.right.weight is layers[1].mlp.up_proj.right.weight


def test_frozen_members_stay_frozen(make_model):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.requires_grad_(False)
    tnlm.compress(model, "basis-sharing", **DATA)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("up_proj" not in name), name
