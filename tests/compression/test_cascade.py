from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tnlm
from tnlm.calibration.data import token_batches
from tnlm.compression.cascade import Output, _Pair, cascade
from tnlm.compression.moments import anchored
from tnlm.errors import CalibrationError
from tnlm.metrics.metric import InputMoment
from tnlm.targets.selection import select

IDS = torch.arange(256) % 61 + 3
DATA = {"calibration": IDS, "max_length": 32}
KINDS = ["llama", "gpt2", "masked-bert"]
MODES = ["sequential", "anchored"]

every_kind = pytest.mark.parametrize("kind", KINDS)
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module")
def batches():
    return token_batches(IDS, None, num_samples=8, max_length=32, seed=0)


def truncated(weight, rank):
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def crude(model, seen=None, rank=3):
    """A fit that cuts every dense weight by SVD, and notes what it was given."""

    def fit(target, moved):
        if seen is not None:
            seen[target.name] = moved
        return Output(truncated(target.weight(model), rank), None)

    return fit


def inputs_of(model, names):
    """The inputs of modules on the calibration data, (tokens, in), float64."""
    seen = {}

    def note(name):
        return lambda _, args: seen.__setitem__(name, args[0].flatten(0, -2).double())

    hooks = [model.get_submodule(n).register_forward_pre_hook(note(n)) for n in names]
    with torch.no_grad():
        model(IDS.reshape(-1, 32))
    for hook in hooks:
        hook.remove()
    return seen


def written(model, weights):
    """A copy of a model with other weights in its targets."""
    made = copy.deepcopy(model)
    for target in select(made).targets:
        target.weight(made).copy_(weights[target.name])
    return made


def contents(model):
    hooks = [
        (n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()
    ]
    return (
        {n: t.detach().numpy().tobytes() for n, t in model.state_dict().items()},
        [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        hooks,
    )


# The model is only looked at


@every_kind
@every_mode
def test_the_model_is_untouched_while_it_is_walked_and_after(kind, mode, make_model, batches):
    model = make_model(kind).train()
    targets = select(model).targets
    next(model.parameters()).requires_grad_(False)
    before, weights = contents(model), contents(model)[0]

    def fit(target, moved):
        assert contents(model)[0] == weights
        return crude(model)(target, moved)

    cascade(model, targets, batches, mode, fit, progress=False)
    assert contents(model) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("last", [0, 4, 9])
def test_the_model_is_untouched_after_a_failure(last, error, make_model, batches):
    model, seen = make_model("llama").train(), {}
    before = contents(model)

    def fit(target, moved):
        if len(seen) == last:
            raise error
        return crude(model, seen)(target, moved)

    with pytest.raises(type(error)):
        cascade(model, select(model).targets, batches, "anchored", fit, progress=False)
    assert contents(model) == before


# What a fit is given


@every_kind
@every_mode
def test_moments_are_those_of_the_inputs_that_the_finished_model_has(
    kind, mode, make_model, batches
):
    model, seen = make_model(kind), {}
    targets = select(model).targets
    inside = [t for t in targets if ".0." in t.name or ".1." in t.name]
    cascade(model, targets, batches, mode, crude(model, seen), progress=False)
    assert seen.keys() == {t.name for t in inside}
    made = written(
        model, {t.name: truncated(t.weight(model), 3 if t in inside else 99) for t in targets}
    )
    names = [t.module for t in inside]
    real, dense = inputs_of(made, names), inputs_of(model, names)
    for target in inside:
        x, y = dense[target.module], real[target.module]
        weight = target.weight(model).double()
        moved = seen[target.name]
        expected = {
            "moment": y.T @ y / len(y),
            "mean": y.mean(0),
            "magnitude": y.abs().mean(0),
        }
        assert moved.statistics.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(moved.statistics[name], value, rtol=1e-4, atol=1e-5)
        if mode == "sequential":
            assert torch.equal(moved.weight, weight)
            torch.testing.assert_close(moved.output, weight @ y.mean(0), rtol=1e-4, atol=1e-5)
        else:
            best = anchored(weight, y.T @ y / len(y), x.T @ y / len(y))
            torch.testing.assert_close(moved.weight, best, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(moved.output, weight @ x.mean(0), rtol=1e-4, atol=1e-5)


def test_the_first_inputs_are_dense_and_later_ones_are_not(make_model, batches):
    model, seen = make_model("llama"), {}
    targets = select(model).targets
    cascade(model, targets, batches, "anchored", crude(model, seen), progress=False)
    dense = inputs_of(model, [t.module for t in targets])
    for target in targets:
        x = dense[target.module]
        moment, moved = x.T @ x / len(x), seen[target.name]
        change = float((moved.statistics["moment"] - moment).norm() / moment.norm())
        corrected = float((moved.weight - target.weight(model)).norm())
        if target.name.startswith("model.layers.0.self_attn") and "o_proj" not in target.name:
            assert change < 1e-5
            assert corrected < 1e-5
        else:
            assert change > 1e-2
            assert corrected > 1e-3


def test_matrices_are_fitted_in_the_order_in_which_they_run(make_model, batches):
    model, seen = make_model("llama"), {}
    targets = list(reversed(select(model).targets))
    cascade(model, targets, batches, "sequential", crude(model, seen), progress=False)
    order = [name.rpartition(".")[2] for name in seen][:7]
    assert set(order[:3]) == {"q_proj", "k_proj", "v_proj"}
    assert order[3] == "o_proj"
    assert set(order[4:6]) == {"gate_proj", "up_proj"}
    assert order[6] == "down_proj"
    assert [".layers.0." in name for name in seen] == [True] * 7 + [False] * 7


def test_what_is_left_dense_changes_nothing_downstream(make_model, batches):
    model, seen = make_model("gpt2"), {}

    def fit(target, moved):
        seen[target.name] = moved

    targets = select(model).targets
    cascade(model, targets, batches, "anchored", fit, progress=False)
    for target in targets:
        torch.testing.assert_close(
            seen[target.name].weight.float(), target.weight(model), rtol=1e-5, atol=1e-6
        )


# The anchored optimum


@given(
    rows=st.integers(1, 6), columns=st.integers(1, 8), noise=st.floats(0, 2), seed=st.integers(0, 9)
)
def test_anchored_solves_the_least_squares(rows, columns, noise, seed, gaussian):
    x = gaussian(60, columns, seed=seed)
    y = x + noise * gaussian(60, columns, seed=seed + 100)
    weight = gaussian(rows, columns, seed=seed + 200)
    found = anchored(weight, y.T @ y / 60, x.T @ y / 60, damping=1e-12)
    best = torch.linalg.lstsq(y, x @ weight.T).solution.T
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-7)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 8),
    anchor=st.floats(0, 1),
    seed=st.integers(0, 9),
)
def test_a_fraction_is_anchored_to_outputs_between_the_streams(
    rows, columns, anchor, seed, gaussian
):
    x = gaussian(60, columns, seed=seed)
    y = x + gaussian(60, columns, seed=seed + 100)
    weight = gaussian(rows, columns, seed=seed + 200)
    moments = y.T @ y / 60, x.T @ y / 60
    found = anchored(weight, *moments, damping=1e-12, fraction=anchor)
    between = y + anchor * (x - y)
    best = torch.linalg.lstsq(y, between @ weight.T).solution.T
    torch.testing.assert_close(found, best, rtol=1e-7, atol=1e-7)
    whole = anchored(weight, *moments, fraction=1.0)
    part = anchored(weight, *moments, fraction=anchor)
    torch.testing.assert_close(part, (1 - anchor) * weight + anchor * whole)
    assert torch.equal(anchored(weight, *moments), whole)
    assert torch.equal(anchored(weight, *moments, fraction=0.0), weight)


@pytest.mark.parametrize("damping", [1e-9, 1e-2, 0.5, None])
def test_streams_that_agree_leave_the_weight(damping, gaussian):
    x, weight = gaussian(60, 5), gaussian(3, 5, seed=1)
    moment = x.T @ x / 60
    torch.testing.assert_close(anchored(weight, moment, moment, damping), weight)


def test_directions_that_data_never_show_keep_the_weight(gaussian):
    x, weight = gaussian(60, 5), gaussian(3, 5, seed=1)
    x[:, 2] = 0.0
    y = 1.3 * x
    found = anchored(weight, y.T @ y / 60, x.T @ y / 60, damping=1e-9)
    torch.testing.assert_close(found[:, 2], weight[:, 2])
    torch.testing.assert_close(1.3 * found[:, [0, 1, 3, 4]], weight[:, [0, 1, 3, 4]])
    silent = torch.zeros(5, 5, dtype=torch.float64)
    assert torch.equal(anchored(weight, silent, silent), weight)


def errors_of_the_last_matrix(model, mode, batches, rank=8):
    """How far the second block's last matrix is off, after the same cuts before it.

    Against the dense output, and against the dense matrix on the compressed input.
    """
    last, made = "model.layers.1.mlp.down_proj", {}
    dense = inputs_of(model, [last])[last]

    def fit(target, moved):
        weight, moment = target.weight(model).double(), dense.T @ dense / len(dense)
        if target.name != last:
            made[target.name] = truncated(weight, 6)
        else:
            if mode != "none":
                weight, moment = moved.weight, moved.statistics["moment"]
            left, right = InputMoment(moment, 1e-9).low_rank(weight, rank)
            made[target.name] = left @ right
        return Output(made[target.name], None)

    targets = select(model).targets
    cascade(model, targets, batches, "sequential" if mode == "none" else mode, fit, progress=False)
    compressed = inputs_of(written(model, made), [last])[last]
    weight = model.get_submodule(last).weight.detach().double()
    output = compressed @ made[last].T
    return float((dense @ weight.T - output).norm()), float((compressed @ weight.T - output).norm())


def test_each_cascade_is_best_at_what_it_asks_for(tiny_llama, batches, monkeypatch):
    monkeypatch.setattr("tnlm.compression.moments.ANCHOR_DAMPING", 1e-9)
    found = {mode: [] for mode in ("none", *MODES)}
    for seed in range(4):
        model = tiny_llama(seed=seed)
        for mode, errors in found.items():
            errors.append(errors_of_the_last_matrix(model, mode, batches))
    for none, sequential, best in zip(*found.values(), strict=True):
        assert best[0] <= min(none[0], sequential[0]) * (1 + 1e-6)
        assert sequential[1] <= min(none[1], best[1]) * (1 + 1e-6)
    means = {mode: sum(error for error, _ in errors) for mode, errors in found.items()}
    assert means["anchored"] < 0.99 * min(means["none"], means["sequential"])


# Through compress


@every_kind
@every_mode
@pytest.mark.parametrize("scheme", ["svd-llm", "kfac-svd", "afm", "asvd"])
def test_schemes_may_be_given_a_cascade(kind, mode, scheme, make_model):
    model = tnlm.compress(make_model(kind), scheme, cascade=mode, keep_targets=0.5, **DATA)
    report = tnlm.report(model)
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert all(0 < layer.error < 1 for layer in report.plan.layers)
    assert report.to_dict()["request"]["cascade"] == mode


@every_kind
def test_anchoring_ends_nearer_to_the_dense_model(kind, make_model):
    def states(model):
        with torch.no_grad():
            return model.base_model(IDS.reshape(-1, 32))[0]

    expected = states(make_model(kind))
    distance = {
        mode: float(
            (
                states(tnlm.compress(make_model(kind), "svd-llm", cascade=mode, rank=4, **DATA))
                - expected
            ).norm()
        )
        for mode in ("none", "anchored")
    }
    assert distance["anchored"] < distance["none"]


@every_kind
def test_the_added_bias_carries_the_mean_of_the_dense_output(kind, make_model):
    dense = make_model(kind)
    model = tnlm.compress(
        make_model(kind), "afm", cascade="anchored", rank=4, targets=r".*\.[01]\..*", **DATA
    )
    names = [t.module for t in select(dense, r".*\.[01]\..*").targets]
    before, after = inputs_of(dense, names), inputs_of(model, names)
    for name in names:
        with torch.no_grad():
            wanted = dense.get_submodule(name)(before[name].float()).mean(0)
            given_mean = model.get_submodule(name)(after[name].float()).mean(0)
        torch.testing.assert_close(given_mean, wanted, rtol=1e-3, atol=1e-4)


def test_bfloat16_models_are_walked(make_model):
    model = make_model("llama").to(torch.bfloat16)
    tnlm.compress(model, "aa-svd", keep_targets=0.6, **DATA)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert model(IDS[None, :32]).logits.isfinite().all()


@every_mode
def test_moments_are_gathered_for_what_is_fitted_alone(mode, make_model, monkeypatch):
    gathered = []
    gather = _Pair.moments

    def note(self, module, *states):
        gathered.append(module)
        return gather(self, module, *states)

    monkeypatch.setattr(_Pair, "moments", note)
    model = make_model("llama")
    tnlm.compress(model, "rom", blocks=1, cascade=mode, keep_targets=0.8, **DATA, progress=False)
    assert gathered
    assert all(".layers.1." in module for module in gathered)


@every_mode
def test_blocks_may_stay_dense_as_a_whole(mode, tiny_llama):
    model = tiny_llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(truncated(model.lm_head.weight, 3))
    options = {"targets": r"lm_head|.*_proj", "tolerance": 1e-5, "cascade": mode}
    tnlm.compress(model, "svd-llm", **options, **DATA, progress=False)
    fitted = {layer.name for layer in tnlm.report(model).plan.layers if layer.format}
    assert fitted == {"lm_head"}


def test_only_anchoring_runs_the_dense_stream(make_model, batches, monkeypatch):
    streams = []
    advance = _Pair.advance

    def note(self, compressed, dense, tune):
        streams.append(dense)
        advance(self, compressed, dense, tune)

    monkeypatch.setattr(_Pair, "advance", note)
    model = make_model("llama")
    for mode in MODES:
        cascade(model, select(model).targets, batches, mode, crude(model), progress=False)
    half = len(streams) // 2
    assert all(stream is None for stream in streams[:half])
    assert all(len(stream) == len(batches) for stream in streams[half:])


@every_kind
@pytest.mark.parametrize("scheme", ["svd-llm", "afm"])
def test_a_fraction_of_the_anchoring_lies_between_its_ends(kind, scheme, make_model):
    def weights(**options):
        model = tnlm.compress(make_model(kind), scheme, rank=4, **options, **DATA, progress=False)
        asked = tnlm.report(model).plan.request
        return list(model.state_dict().values()), asked

    whole, asked = weights(cascade="anchored")
    assert "anchor" not in asked
    none, _ = weights(cascade="sequential")
    part, asked = weights(cascade="anchored", anchor=0.25)
    assert asked["anchor"] == 0.25
    for other, anchor in ((none, 0), (whole, 1)):
        assert all(map(torch.equal, other, weights(cascade="anchored", anchor=anchor)[0]))
        assert not all(map(torch.equal, other, part))


def test_a_plan_with_a_fraction_is_carried_out_with_it(make_model):
    asked = {"cascade": "anchored", "anchor": 0.25, "rank": 4, **DATA}
    one = tnlm.compress(make_model("llama"), "svd-llm", **asked)
    plan = tnlm.plan(make_model("llama"), "svd-llm", **asked)
    other = tnlm.compress(make_model("llama"), plan, **DATA)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_the_next_block_gets_what_a_tuned_one_gives(make_model, batches):
    model, seen, tuned = make_model("llama"), {}, []
    targets = select(model).targets

    def tune(name, block, call, inputs, wanted):
        assert block is model.get_submodule(name)
        tuned.append(name)
        for index, state in enumerate(wanted):
            inputs[index] = state  # as if the outputs were the dense ones
        return True

    cascade(model, targets, batches, "anchored", crude(model, seen), tune=tune, progress=False)
    assert tuned == ["model.layers.0", "model.layers.1"]
    name = "model.layers.1.self_attn.q_proj"
    x = inputs_of(model, [name])[name]
    moment = x.T @ x / len(x)
    torch.testing.assert_close(seen[name].statistics["moment"], moment, rtol=1e-4, atol=1e-5)
    weight = model.get_submodule(name).weight.double()
    torch.testing.assert_close(seen[name].weight, weight, rtol=1e-4, atol=1e-5)


def test_a_cascade_repeats(make_model):
    one, other = (
        tnlm.compress(make_model("gpt2"), "aa-svd", rank=5, **DATA).state_dict() for _ in range(2)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_matrices_outside_the_blocks_are_fitted_too(make_model):
    model = tnlm.compress(make_model("llama"), "aa-svd", targets=["lm_head", "up_proj"], **DATA)
    assert type(model.lm_head).__name__ == "FactorizedLinear"
    assert len(tnlm.report(model).plan.layers) == 3


# Experts see some tokens only


class Experts(nn.Module):
    """Every token goes to one of three experts, by its own features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, -2)
        choice = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            chosen = (choice == index).nonzero().flatten()
            if len(chosen):
                out = out.index_add(0, chosen, expert(flat[chosen]))
        return out.reshape(x.shape)


@pytest.fixture
def mixture(tiny_llama):
    """A Llama with experts in place of its feed-forward layers."""
    model = tiny_llama()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.mlp = Experts(32).eval()
    return model


def test_experts_are_fitted_to_the_dense_statistics(mixture, batches):
    seen = {}
    targets = select(mixture, ignore=["gate"]).targets
    cascade(mixture, targets, batches, "anchored", crude(mixture, seen), progress=False)
    assert seen.keys() == {target.name for target in targets}
    for name, moved in seen.items():
        assert (moved is None) == (".experts." in name)


def test_a_model_of_experts_is_compressed(mixture):
    model = tnlm.compress(mixture, "aa-svd", ignore=["gate"], keep_targets=0.6, **DATA)
    layer = model.model.layers[1]
    assert all(type(expert).__name__ == "FactorizedLinear" for expert in layer.mlp.experts)
    assert type(layer.self_attn.q_proj).__name__ == "FactorizedLinear"
    assert tnlm.report(model).parameters_after == sum(p.numel() for p in model.parameters())


def test_an_expert_that_gets_no_token_later_is_named(tiny_llama):
    class Picky(nn.Module):
        """Asks its expert about all tokens, or about none."""

        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            return self.expert(x) if x[0, 0, 0] < 0 else x

    model = tiny_llama(num_hidden_layers=1)
    model.model.layers[0].mlp = Picky()
    table = model.model.embed_tokens.weight.data
    table[:, 0] = torch.linspace(-1, 1, len(table))
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    small, large = torch.full((1, 8), 4), torch.full((1, 8), 60)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in (small, large)]
    targets = select(model, ["expert"]).targets
    with pytest.raises(CalibrationError, match=r"layers\.0\.mlp\.expert gets different tokens"):
        cascade(model, targets, batches, "anchored", crude(model), progress=False)


# What cannot be walked


def batch(*lengths, padded=False):
    found = []
    for length in lengths:
        ids = torch.arange(length)[None] + 3
        mask = torch.ones_like(ids)
        if padded:
            mask[:, -1] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


@pytest.mark.parametrize(
    "given_batches", [batch(8, 9), batch(8, 8, padded=True)], ids=["ragged", "padded"]
)
def test_data_of_uneven_lengths_is_an_error_that_says_what_to_do(given_batches, make_model):
    model = make_model("llama")
    before = contents(model)
    with pytest.raises(
        CalibrationError, match=r"LlamaForCausalLM cannot be walked .*cascade='none'"
    ):
        cascade(
            model, select(model).targets, given_batches, "anchored", crude(model), progress=False
        )
    assert contents(model) == before


def test_targets_outside_of_all_blocks_are_an_error(make_model, batches):
    model = make_model("llama")
    head = select(model, ["lm_head"]).targets
    with pytest.raises(CalibrationError, match=r"no target lies in a block .* is lm_head\)"):
        cascade(model, head, batches, "anchored", crude(model), progress=False)


def test_blocks_that_depend_on_more_than_the_hidden_state_are_an_error(make_model, batches):
    model = make_model("llama")
    block = model.model.layers[1]
    real = block.forward
    runs = []

    def forward(state, *args, **kwargs):
        runs.append(1)
        return real(state * len(runs), *args, **kwargs)

    block.forward = forward
    with pytest.raises(CalibrationError, match="cannot be walked"):
        cascade(model, select(model).targets, batches, "anchored", crude(model), progress=False)
