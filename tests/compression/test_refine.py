from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import nn

import tnlm
from tnlm.calibration.data import token_batches
from tnlm.compression.refine import Refinement, _in_dtype, refine
from tnlm.compression.tuning import BlockTask
from tnlm.errors import CalibrationError, OptionError

IDS = torch.randint(3, 11, (512,), generator=torch.Generator().manual_seed(0))
"""Of few kinds, so that windows held out are like the others."""
DATA = {"calibration": IDS, "max_length": 32}
KINDS = ["llama", "gpt2", "masked-bert"]

every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def batches():
    return token_batches(IDS, None, num_samples=8, max_length=32, seed=0)


@pytest.fixture
def faster(monkeypatch):
    """A rate at which a few steps show on a tiny model."""
    set_rate(monkeypatch, 1e-3)


def set_rate(monkeypatch, rate):
    defaults = Refinement.__init__.__kwdefaults__ | {"learning_rate": rate}
    monkeypatch.setattr(Refinement.__init__, "__kwdefaults__", defaults)


def blocks_of(model):
    [stack] = [m for m in model.modules() if isinstance(m, nn.ModuleList)][:1]
    return list(stack)


def block_outputs(model):
    """The hidden states after every block, on the calibration data."""
    found = []

    def note(_, __, output):
        found.append((output[0] if isinstance(output, tuple) else output).detach().float())

    hooks = [block.register_forward_hook(note) for block in blocks_of(model)]
    with torch.no_grad():
        model(IDS.reshape(-1, 32))
    for hook in hooks:
        hook.remove()
    return found


def distances(model, dense):
    """The error of every block's output."""
    pairs = zip(block_outputs(model), block_outputs(dense), strict=True)
    return [float((made - wanted).norm()) for made, wanted in pairs]


def held_out(made, wanted):
    """The relative error of a block's output on the windows held out: two of sixteen."""
    squares = (made - wanted).square().sum((1, 2)) / wanted.square().sum((1, 2))
    return float(squares[7::8].mean().sqrt())


def contents(model):
    return (
        {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()},
        [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()],
    )


def truncated(layer, rank):
    u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    made = copy.deepcopy(layer)
    made.weight = nn.Parameter((u[:, :rank] * s[:rank]) @ vh[:rank])
    return made


# What it gains


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("kind", "scheme", "options"),
    [
        *((kind, "svd", {"rank": 6}) for kind in KINDS),
        ("llama", "svd", {"rank": 6, "gauge": False}),
        ("llama", "kron", {"keep_targets": 0.5}),
        ("llama", "tt", {"keep_targets": 0.5}),
        ("llama", "tucker", {"keep_targets": 0.5}),
        ("llama", "btt", {"keep_targets": 0.5}),
        ("llama", "modegpt", {"keep_targets": 0.4}),
        ("gpt2", "modegpt", {"keep_targets": 0.4}),
        ("llama", "afm", {"rank": 4}),
        ("gpt2", "aa-svd", {"rank": 4}),
    ],
)
def test_outputs_of_blocks_come_nearer_to_the_dense_ones(kind, scheme, options, make_model):
    dense = make_model(kind)
    data = DATA if tnlm.schemes.schemes()[scheme].needs_calibration else {}
    plain = tnlm.compress(make_model(kind), scheme, refine=0, **options, **data)
    tuned = tnlm.compress(make_model(kind), scheme, refine=1536, **options, **DATA)
    before, after = distances(plain, dense), distances(tuned, dense)
    assert after[0] < 0.98 * before[0]
    assert after[1] < before[1]
    assert tnlm.report(tuned).parameters_after == sum(p.numel() for p in tuned.parameters())
    report = tnlm.report(tuned)
    assert report.seconds["refine"] > 0
    assert len(report.refined) == 2
    assert all(after <= before for before, after in report.refined.values())
    assert " of 2 blocks, mean held-out error" in str(report)


@pytest.mark.parametrize("rate", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize("tokens", [1, 32, 320])
def test_the_first_block_is_never_worse_than_it_was(rate, tokens, make_model, monkeypatch):
    set_rate(monkeypatch, rate)
    dense = make_model("llama")
    plain = tnlm.compress(make_model("llama"), "svd-llm", rank=8, **DATA)
    tuned = tnlm.compress(make_model("llama"), "svd-llm", rank=8, refine=tokens, **DATA)
    held = [held_out(block_outputs(each)[0], block_outputs(dense)[0]) for each in (plain, tuned)]
    assert held[1] <= held[0] * (1 + 1e-6)
    if rate == 100.0:  # the start is kept, bit for bit
        names = [n for n in plain.state_dict() if ".layers.0." in n]
        one, other = plain.state_dict(), tuned.state_dict()
        assert all(torch.equal(one[name], other[name]) for name in names)


def test_later_blocks_learn_from_the_outputs_of_tuned_ones(make_model, batches):
    model, seen = make_model("llama"), {}

    def take(name):
        return {f"{name}.mlp.up_proj": truncated(model.get_submodule(f"{name}.mlp.up_proj"), 4)}

    def keep(name, tuned):
        seen[name] = tuned

    modules = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    before = contents(model)
    refine(
        model, modules, batches, Refinement(2048, take, keep, learning_rate=1e-2), progress=False
    )
    assert contents(model) == before
    assert list(seen) == ["model.layers.0", "model.layers.1"]
    made, crude = copy.deepcopy(model), copy.deepcopy(model)
    for name in seen:
        crude.set_submodule(f"{name}.mlp.up_proj", take(name)[f"{name}.mlp.up_proj"])
        for full, module in seen[name].items():
            made.set_submodule(full, module)
    for after, first in zip(distances(made, model), distances(crude, model), strict=True):
        assert after < 0.9 * first


class Narrow(nn.Sequential):
    """A matrix of so low a rank that it must choose which outputs it gets right."""

    def __init__(self, weight: torch.Tensor, rank: int = 2) -> None:
        rows, columns = weight.shape
        inner, outer = nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=False)
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        inner.weight = nn.Parameter(s[:rank, None] * vh[:rank])
        outer.weight = nn.Parameter(u[:, :rank].clone())
        super().__init__(inner, outer)


def test_a_form_on_the_outputs_says_which_errors_count(make_model, batches):
    only = torch.zeros(32, 32)
    only[3, 3] = 1.0
    name, errors = "model.layers.0.mlp.down_proj", {}
    for label, root in (("all", None), ("one", only)):
        model, seen = make_model("llama"), {}
        narrow = Narrow(model.get_submodule(name).weight)
        refinement = Refinement(
            2048,
            lambda block, narrow=narrow: {name: narrow} if block in name else {},
            lambda _, tuned, seen=seen: seen.update(tuned),
            weigh=lambda _, root=root: root,
            learning_rate=3e-3,
        )
        refine(model, [name], batches, refinement, progress=False)
        made = copy.deepcopy(model)
        for full, module in seen.items():
            made.set_submodule(full, module)
        gap = block_outputs(made)[0] - block_outputs(model)[0]
        errors[label] = [float(gap.norm()), float(gap[..., 3].norm())]
    assert errors["one"][1] < 0.9 * errors["all"][1]
    assert errors["one"][0] > errors["all"][0]


# In a cascade

PUBLISHED = {"rank": 4, "progress": False, **DATA}
"""A call of aa-svd with the refinement that it has by default."""
FEWER = PUBLISHED | {"refine_passes": 2}


def equal(one, other):
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_aa_svd_refines_every_block(kind, make_model):
    dense = make_model(kind)
    model = tnlm.compress(make_model(kind), "aa-svd", **PUBLISHED)
    plain = tnlm.compress(make_model(kind), "aa-svd", refine_passes=0, **PUBLISHED)
    report = tnlm.report(model)
    assert report.plan.request["refine_passes"] == 25
    assert len(report.refined) == 2
    assert all(after < before for before, after in report.refined.values())
    assert distances(model, dense)[1] < distances(plain, dense)[1]
    assert tnlm.report(plain).refined == {}
    assert "refined" not in str(tnlm.report(plain))


def test_the_report_has_the_errors_that_the_model_has(make_model):
    dense = make_model("llama")
    model = tnlm.compress(make_model("llama"), "aa-svd", **FEWER)
    error = held_out(block_outputs(model)[0], block_outputs(dense)[0])
    after = tnlm.report(model).refined["model.layers.0"][1]
    assert after == pytest.approx(error, rel=1e-4)
    assert tnlm.Report.from_json(tnlm.report(model).to_json()).refined == tnlm.report(model).refined


@pytest.mark.parametrize("off", [{"refine": 0}, {"refine_passes": 0}])
def test_without_refinement_aa_svd_is_the_anchoring_alone(off, make_model):
    one = tnlm.compress(make_model("llama"), "aa-svd", **off, **PUBLISHED)
    other = tnlm.compress(make_model("llama"), "svd-llm", cascade="anchored", **PUBLISHED)
    assert equal(one, other)
    assert tnlm.report(one).plan.request["refine_passes"] == 0


@pytest.mark.parametrize("cascade", ["sequential", "anchored"])
def test_a_cascade_fits_blocks_to_what_refined_ones_give(cascade, make_model, monkeypatch):
    set_rate(monkeypatch, 1e-3)
    asked = {"cascade": cascade, "rank": 4, "progress": False, **DATA}
    model = tnlm.compress(make_model("llama"), "svd-llm", refine=1024, **asked)
    plain = tnlm.compress(make_model("llama"), "svd-llm", **asked)
    errors = [
        {layer.name: layer.error for layer in tnlm.report(each).plan.layers}
        for each in (model, plain)
    ]
    for name, error in errors[0].items():
        assert (error == errors[1][name]) == (".layers.0." in name)
    dense = make_model("llama")
    assert distances(model, dense)[1] < distances(plain, dense)[1]


def test_blocks_that_get_worse_stay_as_fitted_and_are_named(make_model, monkeypatch, caplog):
    set_rate(monkeypatch, 100.0)
    model = tnlm.compress(make_model("llama"), "aa-svd", **FEWER)
    plain = tnlm.compress(make_model("llama"), "aa-svd", refine=0, **PUBLISHED)
    for name, values in plain.state_dict().items():
        # the second block is fitted to outputs of factors, not of their products
        close = {"rtol": 0, "atol": 0} if ".layers.1." not in name else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(model.state_dict()[name], values, **close)
    report = tnlm.report(model)
    assert all(before == after for before, after in report.refined.values())
    assert "refined: 0 of 2 blocks" in str(report)
    assert "2 of 2 blocks, which stay as fitted: model.layers.0, model.layers.1" in caplog.text


@pytest.mark.parametrize("given", [{"refine": 0}, {"refine": 64}, {"refine_passes": 1}])
def test_a_plan_is_carried_out_with_its_refinement(given, make_model):
    plan = tnlm.plan(make_model("llama"), "aa-svd", **given, **PUBLISHED)
    one = tnlm.compress(make_model("llama"), plan, progress=False, **DATA)
    other = tnlm.compress(make_model("llama"), "aa-svd", **given, **PUBLISHED)
    assert equal(one, other)
    assert tnlm.report(one).refined == tnlm.report(other).refined


def test_passes_are_over_the_windows_trained_on(make_model):
    one = tnlm.compress(make_model("llama"), "svd-llm", rank=6, refine_passes=2, **DATA)
    other = tnlm.compress(make_model("llama"), "svd-llm", rank=6, refine=2 * 448, **DATA)
    assert equal(one, other)


def test_a_fused_module_with_dense_parts_is_refined_in_a_cascade(make_model):
    model = tnlm.compress(make_model("gpt2"), "aa-svd", targets=["c_attn.q", "c_fc"], **FEWER)
    assert len(tnlm.report(model).refined) == 2


def test_codes_are_not_refined(make_model):
    by_default = (
        r"refine_passes=25, the default of scheme 'aa-svd', with precision='int8'.*refine=0"
    )
    with pytest.raises(OptionError, match=by_default):
        tnlm.compress(make_model("llama"), "aa-svd", precision="int8", **PUBLISHED)
    model = tnlm.compress(make_model("llama"), "aa-svd", precision="int8", refine=0, **PUBLISHED)
    assert tnlm.report(model).refined == {}


@pytest.mark.parametrize(
    ("given", "asked"), [({}, "refine_passes=25"), ({"refine": 64}, "refine=64")]
)
def test_a_plan_with_refinement_is_not_stored_in_codes(given, asked, make_model):
    plan = tnlm.plan(make_model("llama"), "aa-svd", **given, **PUBLISHED)
    with pytest.raises(OptionError, match=rf"plan with {asked} and .*make the plan with refine=0"):
        tnlm.compress(make_model("llama"), plan, precision="int8", progress=False, **DATA)
    plan = tnlm.plan(make_model("llama"), "aa-svd", refine=0, **PUBLISHED)
    model = tnlm.compress(make_model("llama"), plan, precision="int8", progress=False, **DATA)
    assert tnlm.report(model).refined == {}


# What it changes, and what not


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_block_that_is_not_kept_has_its_values_bit_for_bit(dtype, make_model, monkeypatch):
    set_rate(monkeypatch, 100.0)
    plain = tnlm.compress(make_model("gpt2").to(dtype), "aa-svd", refine=0, **PUBLISHED)
    tuned = tnlm.compress(make_model("gpt2").to(dtype), "aa-svd", **FEWER)
    assert all(before == after for before, after in tnlm.report(tuned).refined.values())
    one, other = plain.state_dict(), tuned.state_dict()
    names = [name for name in one if ".h.0." in name]
    assert names
    for name in names:
        assert one[name].dtype == other[name].dtype
        assert torch.equal(one[name], other[name])


@pytest.mark.usefixtures("faster")
def test_float64_is_trained_in_float64(make_model):
    tuned = tnlm.compress(make_model("llama").double(), "aa-svd", **FEWER)
    assert all(after < before for before, after in tnlm.report(tuned).refined.values())
    for name, value in tuned.state_dict().items():
        if "norm" in name and ".layers." in name:
            assert not torch.equal(value, value.float().double())


def test_arguments_of_a_block_keep_their_types():
    class Masks(NamedTuple):
        local: torch.Tensor
        full: torch.Tensor | None

    given = ((torch.ones(1, dtype=torch.half), 3), {"masks": Masks(torch.ones(1).half(), None)})
    args, kwargs = _in_dtype(given, torch.float32)
    assert args[0].dtype == torch.float32
    assert isinstance(kwargs["masks"], Masks)
    assert kwargs["masks"].local.dtype == torch.float32


@pytest.mark.usefixtures("faster")
@every_kind
def test_factors_biases_and_norms_change_and_nothing_else(kind, make_model):
    dense = make_model(kind)
    plain = tnlm.compress(make_model(kind), "svd", rank=6, targets=r".*\.[01]\..*")
    tuned = tnlm.compress(
        make_model(kind), "svd", rank=6, targets=r".*\.[01]\..*", refine=1024, **DATA
    )
    one, other, old = plain.state_dict(), tuned.state_dict(), dense.state_dict()
    assert one.keys() == other.keys()
    changed = {name for name in one if not torch.equal(one[name], other[name])}
    for name in one:
        inside = ".0." in name or ".1." in name
        if not inside:
            assert name not in changed
        elif name in old or name.endswith(".weight"):
            norm = any(word in name.lower() for word in ("norm", "ln_"))
            assert name in changed or not (norm or "left" in name), name
    norms = [name for name in changed if "norm" in name.lower() or "ln_" in name]
    assert norms
    assert all(name in old for name in norms)


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("kind", "scheme"), [*((kind, "svd") for kind in KINDS), ("llama", "modegpt"), ("llama", "tt")]
)
def test_what_was_tuned_is_saved_and_read_again(kind, scheme, make_model, tmp_path):
    model = tnlm.compress(make_model(kind), scheme, keep_targets=0.4, refine=512, **DATA)
    loaded = tnlm.load(tnlm.save(model, tmp_path / "model"))
    one, other, dense = model.state_dict(), loaded.state_dict(), make_model(kind).state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with torch.no_grad():
        ids = IDS[None, :32]
        assert torch.equal(model(ids).logits, loaded(ids).logits)
    norms = [n for n in dense if "norm" in n.lower() or ".ln_" in n]
    assert any(not torch.equal(other[n], dense[n]) for n in norms)


@pytest.mark.parametrize("training", [False, True])
@every_kind
def test_flags_stay_as_they_were(kind, training, make_model):
    model = make_model(kind).train(training)
    frozen = blocks_of(model)[0]
    frozen.requires_grad_(False)
    tnlm.compress(model, "svd", rank=6, refine=64, **DATA)
    assert all(module.training == training for module in model.modules())
    fixed = {id(p) for p in blocks_of(model)[0].parameters()}
    assert fixed
    assert all(p.requires_grad == (id(p) not in fixed) for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_stays(kind, make_model):
    model = make_model(kind).to(torch.bfloat16)
    plain = tnlm.compress(make_model(kind).to(torch.bfloat16), "svd", rank=6)
    tnlm.compress(model, "svd", rank=6, refine=2048, **DATA)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    dense = make_model(kind).to(torch.bfloat16)
    assert distances(model, dense)[0] < distances(plain, dense)[0]


class WideNorm(nn.Module):
    """A norm that keeps its weight in float32, as some models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        full = x.float()
        return (self.weight * full / full.square().mean(-1, keepdim=True).sqrt()).to(x.dtype)


def test_norms_of_another_dtype_keep_it(make_model):
    model = make_model("llama").to(torch.bfloat16)
    for layer in model.model.layers:
        layer.input_layernorm = WideNorm(32).eval()
    tnlm.compress(model, "svd", rank=6, refine=64, **DATA)
    for layer in model.model.layers:
        assert layer.input_layernorm.weight.dtype == torch.float32
        assert layer.post_attention_layernorm.weight.dtype == torch.bfloat16
        assert layer.mlp.up_proj.right.weight.dtype == torch.bfloat16


@pytest.mark.usefixtures("faster")
def test_it_repeats_and_leaves_the_random_state_alone(make_model):
    def run():
        torch.manual_seed(7)
        model = make_model("gpt2")
        state = torch.get_rng_state()
        tnlm.compress(model, "svd-llm", rank=6, refine=512, **DATA)
        assert torch.equal(torch.get_rng_state(), state)
        return model.state_dict()

    one, other = run(), run()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_no_tokens_is_off(make_model):
    one = tnlm.compress(make_model("llama"), "svd-llm", rank=6, **DATA)
    other = tnlm.compress(make_model("llama"), "svd-llm", rank=6, refine=0, **DATA)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert "refine" not in tnlm.report(other).seconds
    assert "refine" not in tnlm.report(other).plan.request


@pytest.mark.usefixtures("faster")
def test_the_order_of_data_is_drawn_and_all_of_it_is_used(make_model, batches, monkeypatch):
    model, used = make_model("llama"), []
    real = BlockTask.loss

    def loss(self, index):
        if torch.is_grad_enabled():
            used.append(index)
        return real(self, index)

    monkeypatch.setattr(BlockTask, "loss", loss)
    name = "model.layers.0.mlp.up_proj"

    def take(block):
        return {name: truncated(model.get_submodule(name), 4)} if block in name else {}

    refine(model, [name], batches, Refinement(14 * 32, take, lambda *_: None), progress=False)
    assert sorted(used[:7]) == sorted(used[7:]) == list(range(7))  # the last window is held out
    assert used[:7] != list(range(7))


# Shared and tied parameters


@pytest.mark.usefixtures("faster")
def test_a_factor_shared_by_blocks_is_not_tuned(make_model):
    dense = make_model("llama")
    plain = tnlm.compress(make_model("llama"), "basis-sharing", keep_targets=0.5, **DATA)
    tuned = tnlm.compress(
        make_model("llama"), "basis-sharing", keep_targets=0.5, refine=1536, **DATA
    )
    for target, source in tuned.config.quantization_config.tied.items():
        assert tuned.get_parameter(target) is tuned.get_parameter(source)
        assert torch.equal(tuned.get_parameter(source), plain.get_parameter(source))
        left = source.replace("right", "left")
        assert not torch.equal(tuned.get_parameter(left), plain.get_parameter(left))
        assert tuned.get_parameter(source).requires_grad
    before, after = distances(plain, dense), distances(tuned, dense)
    assert after[0] < before[0]
    assert after[1] < before[1]


def test_tied_tables_stay_tied_and_as_they_were(make_model):
    model = make_model("tied-llama")
    table = model.get_input_embeddings().weight
    before = table.detach().clone()
    tnlm.compress(model, "svd", rank=6, refine=256, **DATA)
    assert model.get_input_embeddings().weight is table
    assert model.get_output_embeddings().weight is table
    assert torch.equal(table, before)


# What fails


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["optimizer", "norm"])
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
@pytest.mark.parametrize("cascade", ["none", "anchored"])
def test_a_failure_leaves_the_model_bit_for_bit(
    kind, cascade, step, error, make_model, monkeypatch
):
    def fail(*_, **__):
        raise error

    model = make_model(kind).train()
    next(model.parameters()).requires_grad_(False)
    before = contents(model)
    if step == "optimizer":
        calls = []
        real = torch.optim.AdamW.step

        def late(self, *args, **kwargs):
            calls.append(1)
            return fail() if len(calls) == 12 else real(self, *args, **kwargs)  # in block two

        monkeypatch.setattr(torch.optim.AdamW, "step", late)
    else:
        real_replace = tnlm.compression.pipeline.replace_norm

        def replaced(*args):
            real_replace(*args)
            fail()

        monkeypatch.setattr("tnlm.compression.pipeline.replace_norm", replaced)
    with pytest.raises(type(error)):
        tnlm.compress(model, "svd-llm", rank=6, cascade=cascade, refine=256, **DATA)
    assert contents(model) == before


def test_outputs_that_are_not_finite_are_named(make_model):
    model = make_model("llama")
    model.model.layers[1].input_layernorm.weight.data[3] = float("inf")
    with pytest.raises(CalibrationError):
        tnlm.compress(model, "svd", rank=6, refine=64, **DATA)


def test_uneven_data_is_an_error_that_changes_nothing(make_model):
    model = make_model("llama")
    before = contents(model)
    ragged = [IDS[:16].tolist(), IDS[:9].tolist()]
    with pytest.raises(CalibrationError):
        tnlm.compress(model, "svd", rank=6, refine=64, calibration=ragged, max_length=16)
    assert contents(model) == before
