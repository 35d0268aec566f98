"""Mixtures of experts: unfolded to be fitted, folded to run; all that users do with the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tnlm
from tests.mixtures import IDS, KINDS, make
from tnlm.compression import pipeline
from tnlm.errors import CheckpointError, OptionError, TargetError
from tnlm.layers.experts import FactorizedExperts
from tnlm.layers.linear import FactorizedLinear

CASES = [(kind, scheme) for kind in KINDS for scheme in ("svd", "kron", "tt", "svd-llm")]
CASES += [("Mixtral", "auto"), ("GptOss", "auto")]
CASES += [(kind, "slices") for kind in KINDS if kind != "DeepseekV3"]  # whose attention stays dense
every_case = pytest.mark.parametrize(("kind", "scheme"), CASES)
every_kind = pytest.mark.parametrize("kind", KINDS)
TABLE = re.compile(r"^\| ([\w-]+) \| .* \| (0\.\d+) \| (0\.\d+) \|$", re.M)


def data(scheme):
    return {} if scheme in ("svd", "kron", "tt") else {"calibration": IDS, "max_length": 16}


def compressed(kind, scheme="svd", **options):
    options = {"keep_targets": 0.6, "progress": False, **data(scheme), **options}
    if scheme == "slices":  # the experts of a projection are slices of one tensor
        formats = ("stack-tucker", "expert-tucker")
        scheme = tnlm.scheme("stack-tucker", formats=formats, allocation="uniform")
    return tnlm.compress(make(kind), scheme, **options)


def experts_of(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, FactorizedExperts)]


@every_case
def test_experts_are_compressed_saved_trained_and_made_dense(kind, scheme, tmp_path):
    model = compressed(kind, scheme)
    report = tnlm.report(model)
    assert report.plan.targets_after.params <= 0.6 * report.plan.targets_before.params
    assert report.plan.coverage.share >= 0.9
    left = [each.name for each in report.plan.coverage.left if ".experts" in each.name]
    assert all(name.endswith("bias") for name in left)  # biases are no matrices, but are listed
    held = sum(p.numel() for p in model.parameters())
    assert held == report.plan.model_after.params

    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for parameter in loaded.parameters():  # how one row is multiplied depends on its alignment
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    model.train()(IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".experts." in name)
    model.eval()
    layers = {
        n: [[m.stack(p).layer(e) for e in range(4)] for p in m.layout.shapes]
        for n, m in experts_of(model)
    }
    with torch.no_grad():
        before = model(IDS).logits
        dense = tnlm.to_dense(model)
        torch.testing.assert_close(dense(IDS).logits, before, rtol=0, atol=1e-5)
    plain = make(kind)
    for name, of_experts in layers.items():
        found, original = dense.get_submodule(name), plain.get_submodule(name)
        assert type(found) is type(original)
        assert found.state_dict().keys() == original.state_dict().keys()
        layout = loaded.get_submodule(name).layout
        for projection, each in zip(layout.shapes, of_experts, strict=True):
            stands_for = torch.stack([whole(layer, layout.shapes[projection]) for layer in each])
            assert torch.equal(layout.weight(found, projection), stands_for)


def whole(layer, shape):
    """Return the matrix of a layer, with zeros for channels that were cut."""
    small = layer.to_dense() if isinstance(layer, FactorizedLinear) else layer.weight
    full = torch.zeros(shape)
    full[: small.shape[0], : small.shape[1]] = small.detach()
    return full


@every_kind
def test_a_plan_leaves_the_model_and_is_carried_out(kind):
    model = make(kind)
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    decided = tnlm.plan(model, "svd", keep_targets=0.6, progress=False)
    assert dict(model.named_modules()) == modules
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    again = tnlm.Plan.from_json(decided.to_json())
    tnlm.compress(model, again, progress=False)
    torch.testing.assert_close(model(IDS).logits, compressed(kind)(IDS).logits)


@every_kind
def test_a_failed_compression_leaves_the_model_bit_for_bit(kind, monkeypatch):
    model = make(kind)
    modules, before = dict(model.named_modules()), model.state_dict()
    values = {name: tensor.clone() for name, tensor in before.items()}

    def fail(*_):
        raise RuntimeError("stop")

    monkeypatch.setattr(pipeline, "attach", fail)
    with pytest.raises(RuntimeError, match="stop"):
        tnlm.compress(model, "svd", keep_targets=0.6, progress=False)
    assert dict(model.named_modules()) == modules
    after = model.state_dict()
    assert after.keys() == values.keys()
    assert all(torch.equal(after[name], values[name]) for name in values)


@pytest.mark.parametrize("scheme", ["svd", "kron", "slices"])
@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_compiled_experts_are_exact(kind, scheme):
    _, experts = experts_of(compressed(kind, scheme))[0]
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    index = torch.tensor([[0, 1], [1, 0], [0, 3], [3, 1], [1, 3]])  # none goes to 2
    torch._dynamo.reset()
    faster = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(faster(x, index, weights), experts(x, index, weights))
    loss = faster(x, index, weights).square().sum()
    names, parameters = zip(*experts.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(experts(x, index, weights).square().sum(), parameters)
    for name, one, other in zip(names, found, expected, strict=True):
        torch.testing.assert_close(one, other, msg=name)


@pytest.mark.parametrize("ranks", [None, (3, 20, 14)])
def test_slices_share_factors_that_are_stored_once(ranks, tmp_path):
    options = {} if ranks is None else {"ranks": ranks, "max_macs": 2.0}
    model = compressed("Mixtral", "slices", targets=["experts"], **options)
    plan = tnlm.report(model).plan
    for _, experts in experts_of(model):
        for projection in experts.layout.shapes:
            stack = experts.stack(projection)
            sizes = {name: len(each) for name, each in stack.named_parameters()}
            assert stack.shared
            assert sizes == {name: 1 if name in stack.shared else 4 for name in sizes}
    for layer in plan.layers:
        assert layer.format == "expert-tucker"
        assert layer.before.macs == 2 * 48 * 32  # 2 of 4 experts
        assert 0 < layer.error < 1
    assert model.config.quantization_config.tied == {}
    again = tnlm.Plan.from_json(plan.to_json())
    tnlm.compress(plain := make("Mixtral"), again, **data("slices"), progress=False)
    with torch.no_grad():
        torch.testing.assert_close(plain(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(tnlm.load(tmp_path / "model")(IDS).logits, model(IDS).logits)


def test_slices_need_an_allocation_that_chooses():
    with pytest.raises(OptionError, match="expert-tucker and low-rank, which both replace"):
        compressed("Mixtral", "stack-tucker", allocation="even")


@pytest.mark.parametrize(
    ("chosen", "replaced"),
    [
        (["experts"], {"gate", "up", "down"}),
        (["down_proj"], {"down"}),
        (["gate_up_proj"], {"gate", "up"}),
        (r".*experts\.up_proj", {"up"}),
        (["model.layers.0.mlp.experts"], {"gate", "up", "down"}),
    ],
)
def test_parts_of_experts_are_chosen(chosen, replaced):
    model = compressed("Mixtral", targets=chosen)
    config = model.config.quantization_config.modules
    assert set(config) <= {f"model.layers.{n}.mlp.experts" for n in range(2)}
    for entry in config.values():
        found = {part["name"] for part in entry["parts"] if part["kind"] != "dense"}
        assert found == replaced


@pytest.mark.parametrize("scheme", ["stack-tucker", "basis-sharing", "modegpt", "asvd", "afm"])
def test_other_schemes_take_experts_or_leave_them_whole(scheme, tmp_path):
    model = tnlm.compress(
        make("Mixtral"), scheme, calibration=IDS, max_length=16, keep_targets=0.9, progress=False
    )
    dense = type(make("Mixtral").model.layers[0].mlp.experts)
    kinds = {type(layer.mlp.experts) for layer in model.model.layers}
    assert kinds <= {dense, FactorizedExperts}
    tnlm.save(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(tnlm.load(tmp_path / "model")(IDS).logits, model(IDS).logits)


def test_what_is_ignored_stays_the_same_object():
    model = make("Mixtral")
    experts = model.model.layers[0].mlp.experts
    tnlm.compress(model, "svd", keep_targets=0.6, ignore=["experts"], progress=False)
    assert model.model.layers[0].mlp.experts is experts
    assert not any("experts" in name for name in model.config.quantization_config.modules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": ["experts.1.up_proj"]}, "1 of 4 experts are chosen for .*experts.up_proj"),
        ({"ignore": ["experts.0.down_proj"]}, "3 of 4 experts are chosen for .*down_proj"),
        ({"targets": "gate_up_porj"}, "no matrix matches.*did you mean"),
        ({"targets": "gate_up_proj"}, r"use \['gate_up_proj'\]"),
        ({"ignore": ["expert"]}, "matches no matrix"),
    ],
)
def test_wrong_parts_are_refused(options, message):
    model = make("Mixtral")
    modules = dict(model.named_modules())
    with pytest.raises(TargetError, match=message):
        tnlm.compress(model, "svd", keep_targets=0.6, progress=False, **options)
    assert dict(model.named_modules()) == modules


def test_experts_that_no_token_reaches_borrow_from_the_others(caplog):
    model = make("Mixtral")
    for layer in model.model.layers:  # fewer experts than the config says
        router = layer.mlp.gate
        router.weight = nn.Parameter(router.weight[:3].detach().clone())
        router.num_experts = 3
    for scheme in ("svd-llm", "auto"):
        made = tnlm.compress(
            make("Mixtral") if scheme == "auto" else model,
            scheme,
            keep_targets=0.6,
            progress=False,
            **data(scheme),
        )
        assert "borrow what they lack" in caplog.text
        for _, experts in experts_of(made):
            assert all(bool(tensor.isfinite().all()) for tensor in experts.state_dict().values())


@pytest.mark.parametrize("cascade", ["sequential", "anchored"])
def test_a_cascade_fits_experts_to_the_dense_model(cascade):
    model = compressed("Mixtral", "svd-llm", cascade=cascade)
    assert len(experts_of(model)) == 2
    assert all(0 < layer.error < 1 for layer in tnlm.report(model).plan.layers)


@pytest.mark.parametrize("recover", ["distill", "mixed-rank"])
def test_recoveries_take_experts_along(recover):
    model = compressed("Mixtral", "svd-llm", recover=recover, recover_tokens=64)
    assert len(experts_of(model)) == 2


def test_factors_are_trained():
    model = compressed("Mixtral")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tnlm.finetune(
        model,
        IDS.flatten(),
        tokens=512,
        max_length=16,
        batch_size=2,
        train="factors",
        progress=False,
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if ".experts." in name} <= changed
    assert not any("embed_tokens" in name for name in changed)


def test_experts_run_in_half_precision(tmp_path):
    make("GptOss").save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    tnlm.compress(model, "svd", keep_targets=0.6, progress=False)
    tnlm.save(model, tmp_path / "model")
    loaded = tnlm.load(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert {p.dtype for _, m in experts_of(loaded) for p in m.parameters()} == {torch.bfloat16}


def test_shards_are_read(tmp_path):
    model = compressed("Qwen3Moe")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


BROKEN = {
    "more experts": (lambda e: e.update(experts=5), "experts=5; the model has 4"),
    "no experts": (lambda e: e.update(experts=0), "experts=0"),
    "a word": (lambda e: e.update(experts="4"), "experts='4'"),
    "a part less": (lambda e: e["parts"].pop(), "its parts must be gate, up, down"),
    "another shape": (lambda e: e["parts"][0].update(shape=[49, 32]), "gate is 49x32"),
    "a bias": (lambda e: e["parts"][0].update(bias=True), "bias=True"),
    "another kind": (lambda e: e["parts"][0].update(kind="head"), "cannot be a matrix of experts"),
    "a cut of one": (
        lambda e: e["parts"][0].update(kind="sliced", shape=[8, 32], full=[48, 32], cut="rows"),
        "down_proj reads 48 channels",
    ),
    "a large rank": (lambda e: e["parts"][0]["options"].update(rank=10**9), "rank=1000000000"),
}


BROKEN_SHARED = {
    "no list": (lambda e: e["parts"][0].update(shared=True), "shared=True; allowed: some of"),
    "another factor": (lambda e: e["parts"][0].update(shared=["left"]), r"shared=\['left'\]"),
    "nothing": (lambda e: e["parts"][0].update(shared=[]), "larger than the dense matrices"),
}


@pytest.mark.parametrize("case", BROKEN_SHARED)
def test_broken_entries_of_shared_factors_are_refused(case, tmp_path):
    options = {"targets": ["experts"], "ranks": (4, 22, 22), "max_macs": 2.0}
    compressed("Mixtral", "slices", **options).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change, message = BROKEN_SHARED[case]
    change(config["quantization_config"]["modules"]["model.layers.0.mlp.experts"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", BROKEN)
def test_broken_entries_are_refused(case, tmp_path):
    compressed("Mixtral").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    change, message = BROKEN[case]
    change(config["quantization_config"]["modules"]["model.layers.0.mlp.experts"])
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_broken_order_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    compressed("Mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if ".experts." in n and n.endswith("_order"))
    tensors[name][2, 0] = tensors[name][2, 1]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"_order\[2\] is no permutation"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@every_kind
def test_the_guide_says_how_much_there_is(kind):
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "experts.md").read_text()
    written = {row[1].replace("-", "").lower(): row.groups()[1:] for row in TABLE.finditer(guide)}
    sizes = {name: p.numel() for name, p in make(kind).named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    share = tnlm.plan(make(kind), "svd", progress=False).coverage.share
    assert written[kind.lower()] == (f"{experts / sum(sizes.values()):.2f}", f"{share:.2f}")
