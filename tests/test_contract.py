"""What every format and every layer must do; formats are found by looking, never listed."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import threading
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tnlm.checkpoint.entries import build, dense_module
from tnlm.decompositions import formats, get_format
from tnlm.decompositions.base import Ceiling, from_dict, to_dict
from tnlm.errors import OptionError, RankError
from tnlm.layers import embedding
from tnlm.layers.linear import FactorizedLinear
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.targets.table import TableTarget
from tnlm.tensors.costs import macs
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Factors, Network

# Tall, wide, prime, square, and as small as can be.
SHAPES = [(12, 8), (6, 20), (7, 11), (4, 4), (1, 3), (3, 1), (1, 1)]
LAYERS = {"linear": ("linear",), "embedding": ("embedding", "head")}
# Formats of another kind replace several matrices at once, and have tests of their own.
DROP_INS = {
    name: structure for name, structure in formats().items() if structure.kinds <= LAYERS.keys()
}
FORMATS = sorted(DROP_INS)


class Case(NamedTuple):
    """One spec of one format for one shape."""

    format: str
    shape: tuple[int, int]
    spec: Any

    @property
    def structure(self):
        return get_format(self.format)

    @property
    def network(self) -> Network:
        return self.structure.network(self.shape, self.spec)

    @property
    def gauged(self) -> bool:
        return self.network.gauge is not None

    @property
    def id(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in to_dict(self.spec).items())
        return f"{self.format}-{self.shape[0]}x{self.shape[1]}-{options}".replace(" ", "")


class Built(NamedTuple):
    """A layer of some kind, what it stands for, and the entry that describes it."""

    case: Case
    kind: str
    layer: Any
    dense: Tensor
    bias: Tensor | None
    entry: dict[str, Any]

    def inputs(self, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
        rows, columns = self.case.shape
        generator = torch.Generator().manual_seed(1)
        if self.kind == "embedding":
            return torch.randint(rows, lead, generator=generator)
        return torch.randn(*lead, columns, generator=generator, dtype=torch.float64).to(dtype)

    def expected(self, x: Tensor) -> Tensor:
        if self.kind == "embedding":
            return F.embedding(x, self.dense)
        return F.linear(x.double(), self.dense, self.bias)


def gauges(structure) -> list[dict[str, bool]]:
    named = {field.name for field in dataclasses.fields(structure.spec)}
    return [{"gauge": True}, {"gauge": False}] if "gauge" in named else [{}]


def spread(items: list[Any], count: int) -> list[Any]:
    """Take ``count`` items, evenly spaced: extreme and balanced splits."""
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def cases(keep: float, shapes=SHAPES, count: int = 2) -> list[Case]:
    found = []
    for name, structure in DROP_INS.items():
        for shape in shapes:
            for options in gauges(structure):
                budget = Ceiling(keep * math.prod(shape))
                specs = list(structure.candidates(shape, options, budget))
                found += [Case(name, shape, spec) for spec in spread(specs, count)]
    return found


def weight_of(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@functools.cache
def fitted(case: Case) -> Factors:
    return case.structure.fit(weight_of(case.shape), Metric(), case.spec)


def make(case: Case, kind: str, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> Built:
    shape, factors = case.shape, fitted(case)
    entry = {
        "kind": kind,
        "shape": list(shape),
        "bias": bias and kind != "embedding",
        "format": case.format,
        "options": to_dict(case.spec),
        "order": None,
        "padding_idx": None,
    }
    values = torch.linspace(-1, 1, shape[0], dtype=torch.float64) if entry["bias"] else None
    layer = build(entry, dtype=dtype).store(fix(case.network, factors), values)
    if values is not None:
        nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(2))
        values = layer.bias.detach().double()
    dense = case.structure.reconstruct(shape, case.spec, factors)
    return Built(case, kind, layer, dense, values, entry)


def with_kinds(found: list[Case]) -> list[tuple[Case, str]]:
    """Pair cases with the layers that can hold them: a table has no gauge."""
    return [
        (case, kind)
        for case in found
        for target in sorted(case.structure.kinds)
        for kind in LAYERS[target]
        if kind == "linear" or not case.gauged
    ]


def label(value: Any) -> str | None:
    return value.id if isinstance(value, Case) else None


SMALL, FULL = cases(0.7), cases(math.inf, count=1)
EVERY = SMALL + FULL
# For what hardly depends on the spec; and one spec for each format and gauge, for what is slow.
SOME = cases(0.7, [(12, 8), (6, 20)]) + cases(math.inf, [(7, 11), (3, 1), (1, 1)], count=1)
FEW = cases(0.75, [(12, 8)], count=1)

every_case = pytest.mark.parametrize("case", EVERY, ids=label)
every_layer = pytest.mark.parametrize(("case", "kind"), with_kinds(EVERY), ids=label)
linear_cases = pytest.mark.parametrize(
    "case", [case for case in EVERY if "linear" in case.structure.kinds], ids=label
)
some_layers = pytest.mark.parametrize(("case", "kind"), with_kinds(SOME), ids=label)
few_cases = pytest.mark.parametrize("case", FEW, ids=label)
few_layers = pytest.mark.parametrize(("case", "kind"), with_kinds(FEW), ids=label)


def test_every_format_is_covered():
    assert {case.format for case in FEW} == {case.format for case in FULL} == set(FORMATS)
    assert {kind for _, kind in with_kinds(FEW)} == {"linear", "embedding", "head"}
    for name, structure in formats().items():
        assert structure.name == name
        several = {"channels", "channel-ranks", "heads", "experts", "stack", "expert-stack"}
        assert structure.kinds <= {*LAYERS, *several, "submatrix"}


# --- formats


@every_case
def test_reported_error_is_the_measured_one(case):
    weight = weight_of(case.shape)
    rebuilt = case.structure.reconstruct(case.shape, case.spec, fitted(case))
    measured = Metric().relative(weight, rebuilt)
    [reported] = case.structure.errors(weight, Metric(), [case.spec])
    if case.format == "tucker":  # HOOI only improves on the HOSVD that is reported
        assert measured <= reported + 1e-7
    else:
        assert reported == pytest.approx(measured, abs=1e-7)


@pytest.mark.parametrize(
    "case", [case for case in SMALL if "input" in case.structure.metrics], ids=label
)
def test_reported_error_is_in_the_metric(case):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, case.shape[1], generator=generator, dtype=torch.float64)
    metric = InputMoment(x.T @ x / 30)
    weight = weight_of(case.shape)
    factors = case.structure.fit(weight, metric, case.spec)
    rebuilt = case.structure.reconstruct(case.shape, case.spec, factors)
    measured = metric.relative(weight, rebuilt)
    [reported] = case.structure.errors(weight, metric, [case.spec])
    if case.format == "low-rank":
        assert reported == pytest.approx(measured, abs=1e-7)
    elif case.format == "kronecker":  # exact only where the metric is itself a Kronecker product
        assert measured == pytest.approx(reported, rel=0.25)
    else:  # of the start, which alternating least squares can only improve on
        assert measured <= reported + 1e-7
        assert reported <= 1.25 * measured + 1e-7


@pytest.mark.parametrize("case", FULL, ids=label)
def test_full_rank_is_exact(case):
    weight = weight_of(case.shape)
    rebuilt = case.structure.reconstruct(case.shape, case.spec, fitted(case))
    torch.testing.assert_close(rebuilt, weight, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(12, 8), (6, 20), (4, 4)])
def test_error_falls_as_ranks_grow(name, shape):
    structure, weight, compared = get_format(name), weight_of(shape), 0
    for case in [case for case in cases(math.inf, [shape]) if case.format == name]:
        fixed = {k: v for k, v in to_dict(case.spec).items() if k not in ("rank", "ranks", "terms")}
        specs = {
            spec
            for keep in (0.2, 0.4, 0.6, 0.8, 1.0, math.inf)
            for spec in structure.candidates(shape, fixed, Ceiling(keep * math.prod(shape)))
        }
        errors = {spec: structure.errors(weight, Metric(), [spec])[0] for spec in specs}
        for small in specs:
            for large in specs:
                pairs = list(zip(sizes(small), sizes(large), strict=True))
                if small != large and all(a <= b for a, b in pairs):
                    assert errors[large] <= errors[small] + 1e-7
                    compared += 1
    assert compared > 0


def sizes(spec: Any) -> list[int]:
    """Return the ranks of a spec, however it names them."""
    values = to_dict(spec)
    found = [values[key] for key in ("rank", "ranks", "terms") if key in values]
    return [size for item in found for size in (item if isinstance(item, list) else [item])]


dimension = st.integers(1, 24)


@given(shape=st.tuples(dimension, dimension), keep=st.floats(0.05, 1.2), speed=st.floats(0.1, 2))
def test_candidates_are_within_their_budget(shape, keep, speed):
    total = math.prod(shape)
    for structure in DROP_INS.values():
        # Only what is stored is limited of a table: a lookup costs little.
        most = speed * total if "linear" in structure.kinds else math.inf
        budget = Ceiling(keep * total, most)
        for options in gauges(structure):
            for spec in structure.candidates(shape, options, budget):
                network = structure.network(shape, spec)
                assert network.params <= budget.params
                assert macs(network) <= budget.macs
                assert all(to_dict(spec)[key] == value for key, value in options.items())


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    tolerance=st.sampled_from([1e-9, 1e-3, 0.1, 0.4, 0.9]),
    decay=st.floats(0, 2),
    seed=st.integers(0, 10),
)
def test_a_tolerance_is_met(shape, tolerance, decay, seed):
    u, s, vh = torch.linalg.svd(weight_of(shape, seed), full_matrices=False)
    weight = u * (s * torch.exp(-decay * torch.arange(len(s)))) @ vh
    for structure in DROP_INS.values():
        for options in gauges(structure):
            found = structure.within(weight, Metric(), options, tolerance)
            assert len(found) > 0
            for spec in found:
                factors = structure.fit(weight, Metric(), spec)
                rebuilt = structure.reconstruct(shape, spec, factors)
                # Energies come from Gram matrices, which hold errors of 1e-8 and less as noise.
                assert Metric().relative(weight, rebuilt) <= tolerance + 1e-7


@every_case
def test_a_zero_matrix_stays_zero(case):
    zero = torch.zeros(case.shape)
    stored = fix(case.network, case.structure.fit(zero, Metric(), case.spec))
    layer = build(make(case, sorted(case.structure.kinds)[-1]).entry, dtype=torch.float64)
    if isinstance(layer, FactorizedLinear):
        assert not layer.store(stored).to_dense().any()
    assert not case.structure.reconstruct(
        case.shape, case.spec, case.structure.fit(zero, Metric(), case.spec)
    ).any()
    assert case.structure.errors(zero, Metric(), [case.spec]) == [0.0]


@every_case
def test_spec_round_trips_through_json(case):
    written = json.loads(json.dumps(to_dict(case.spec)))
    assert from_dict(case.structure.spec, written) == case.spec
    with pytest.raises(OptionError, match="'rnak'"):
        from_dict(case.structure.spec, {**written, "rnak": 1})


@few_cases
def test_ill_typed_and_missing_fields_are_rejected(case):
    kind, written = case.structure.spec, to_dict(case.spec)
    for field in (item for item in dataclasses.fields(kind) if item.name in written):
        # A truth value is no whole number, nor the other way round.
        other = 1 if isinstance(written[field.name], bool) else True
        for wrong in ("two", 0, -1, 1.5, [0], [True], [], {}, None, other):
            with pytest.raises(OptionError, match=field.name):
                from_dict(kind, {**written, field.name: wrong})
        if field.default is dataclasses.MISSING:
            with pytest.raises(OptionError, match=field.name):
                from_dict(kind, {k: v for k, v in written.items() if k != field.name})


@few_cases
def test_ranks_beyond_the_matrix_are_refused(case):
    for key, value in to_dict(case.spec).items():
        if key in ("rank", "terms"):
            wrong: Any = 10**6
        elif key == "gauge":
            continue
        else:
            wrong = tuple(10**6 for _ in value)
        with pytest.raises(RankError, match=key):
            case.structure.network(case.shape, dataclasses.replace(case.spec, **{key: wrong}))


@pytest.mark.parametrize(
    ("name", "side"),
    [
        (name, field.name)
        for name, structure in DROP_INS.items()
        for field in dataclasses.fields(structure.spec)
        if field.name.endswith("_split")
    ],
)
@pytest.mark.parametrize("split", [(5, 7), (97,), (24,) + (1,) * 9, (2, 2, 2, 2, 2)])
def test_splits_that_the_matrix_cannot_have_are_refused(name, side, split):
    structure, weight = get_format(name), weight_of((12, 8))
    with pytest.raises(RankError, match=side):
        structure.candidates((12, 8), {side: split}, Ceiling())
    with pytest.raises(RankError, match=side):
        structure.within(weight, Metric(), {side: split}, 0.1)


@few_cases
def test_fits_are_repeatable(case):
    weight = weight_of(case.shape)
    first, second = (case.structure.fit(weight, Metric(), case.spec) for _ in range(2))
    assert list(first) == list(second) == list(case.network.factors)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("case", cases(0.5, [(96, 80)], count=1), ids=label)
def test_fits_do_not_depend_on_the_number_of_threads(case):
    weight, before, found = weight_of(case.shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            factors = case.structure.fit(weight, Metric(), case.spec)
            found.append(case.structure.reconstruct(case.shape, case.spec, factors))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", ["numpy", "pytorch"])
def test_tensorly_keeps_its_backend(name, backend):
    import tensorly

    before, seen = tensorly.get_backend(), []
    [case] = spread([case for case in FEW if case.format == name], 1)[:1]
    try:
        tensorly.set_backend(backend, local_threadsafe=True)
        case.structure.errors(weight_of(case.shape), Metric(), [case.spec])
        assert tensorly.get_backend() == backend
        thread = threading.Thread(target=lambda: seen.append(tensorly.get_backend()))
        thread.start()
        thread.join()
    finally:
        tensorly.set_backend(before, local_threadsafe=True)
    assert seen == ["numpy"]


@every_case
def test_weights_are_left_as_they_are(case):
    weight = weight_of(case.shape).requires_grad_()
    before = weight.detach().clone()
    factors = case.structure.fit(weight, Metric(), case.spec)
    assert torch.equal(weight, before)
    assert all(f.dtype == torch.float64 and not f.requires_grad for f in factors.values())
    shapes = {name: tuple(factor.shape) for name, factor in factors.items()}
    assert shapes == {name: case.network.shape_of(name) for name in case.network.factors}


# --- layers


class Products(TorchFunctionMode):
    """Counts the multiply-adds of einsums, linears and bmms, and the operands of every einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[int] = []
        self.macs = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.einsum:
            equation, *tensors = args
            self.operands.append(len(tensors))
            sizes: dict[str, int] = {}
            for modes, tensor in zip(equation.split("->")[0].split(","), tensors, strict=True):
                sizes |= zip(modes, tensor.shape, strict=True)
            self.macs += math.prod(sizes.values()) if len(tensors) > 1 else 0
        elif function is F.linear:
            self.macs += args[0].numel() * args[1].shape[0]
        elif function is torch.bmm:
            self.macs += args[0].numel() * args[1].shape[2]
        return function(*args, **(kwargs or {}))


@every_layer
def test_apply_equals_dense(case, kind):
    built = make(case, kind)
    torch.testing.assert_close(built.layer.to_dense(), built.dense, atol=1e-10, rtol=1e-10)
    for lead in [(), (0,), (1,), (5,), (2, 0), (2, 3), (2, 1, 3)]:
        x = built.inputs(*lead)
        out = built.layer(x)
        width = case.shape[1] if kind == "embedding" else case.shape[0]
        assert out.shape == (*lead, width)
        torch.testing.assert_close(out, built.expected(x), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    "case", [case for case, kind in with_kinds(EVERY) if kind == "head"], ids=label
)
def test_a_head_works_some_rows_at_a_time(case, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK_NUMBERS", 3 * case.shape[1])
    built = make(case, "head")
    x = built.inputs(2)
    torch.testing.assert_close(built.layer(x), built.expected(x), atol=1e-10, rtol=1e-10)
    pieces = list(built.layer._chunks())
    assert max(len(rows) for rows in pieces) <= 3
    torch.testing.assert_close(torch.cat(pieces), built.dense, atol=1e-10, rtol=1e-10)


@some_layers
def test_inputs_need_not_be_contiguous(case, kind):
    built = make(case, kind)
    x = built.inputs(3, 4).transpose(0, 1)
    assert x.numel() <= 12 or not x.is_contiguous()
    torch.testing.assert_close(built.layer(x), built.expected(x), atol=1e-10, rtol=1e-10)


@every_layer
def test_params_are_counted_exactly(case, kind):
    layer = make(case, kind, bias=False).layer
    assert sum(p.numel() for p in layer.parameters()) == case.network.params
    assert sum(b.numel() * b.element_size() for b in layer.buffers()) == case.network.index_bytes


@every_layer
def test_macs_are_counted_exactly(case, kind):
    built = make(case, kind)
    if kind == "linear":
        built.layer.crossing = math.inf  # where rebuilding pays at one token, it costs even less
        price = built.layer.macs
        assert price == macs(case.network)
    else:
        price = table_price(case, kind)
    with Products() as products, FlopCounterMode(display=False) as counter:
        built.layer(built.inputs(1))
    assert products.macs == price
    # Torch's counter does not see an einsum over a bond of size 1, which multiplies entrywise.
    if kind == "linear" or 1 not in case.network.sizes.values():
        assert counter.get_total_flops() == 2 * price


def table_price(case: Case, kind: str) -> int:
    """Return what the report says a lookup, or the tied head, costs."""
    lookup, both = (
        TableTarget("", "", case.shape, tied).cost(case.network, 4).macs for tied in [(), ("head",)]
    )
    return lookup if kind == "embedding" else both - lookup


@linear_cases
def test_both_paths_agree(case):
    built = make(case, "linear")
    layer = built.layer
    if layer.crossing == math.inf:
        assert layer.macs <= math.prod(case.shape)
    for tokens in (1, 5):
        x, outputs = built.inputs(tokens), []
        for layer.crossing in (math.inf, 0):
            outputs.append(layer(x))
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-10, rtol=1e-10)


@some_layers
def test_state_dict_round_trips_bit_exactly(case, kind):
    built = make(case, kind, dtype=torch.float32)
    other = build(built.entry, dtype=torch.float32)
    other.load_state_dict(copy.deepcopy(built.layer.state_dict()), strict=True)
    x = built.inputs(3, dtype=torch.float32)
    assert torch.equal(built.layer(x), other(x))
    assert torch.equal(built.layer.weight, other.weight)


@some_layers
def test_meta_construction_allocates_nothing(case, kind):
    built = make(case, kind)
    meta = build(built.entry, device="meta", dtype=torch.float64)
    state = meta.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}
    real = built.layer.state_dict()
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in real.items()}
    meta.load_state_dict(real, assign=True)
    x = built.inputs(2)
    assert torch.equal(meta(x), built.layer(x))


@pytest.mark.parametrize(
    ("case", "kind"), [pair for pair in with_kinds(SOME) if pair[1] != "embedding"], ids=label
)
def test_a_bias_is_added_once_or_not_at_all(case, kind):
    plain, biased = make(case, kind, bias=False), make(case, kind)
    x = plain.inputs(3)
    assert plain.layer.bias is None
    assert "bias" not in plain.layer.state_dict()
    torch.testing.assert_close(biased.layer(x), plain.layer(x) + biased.bias, atol=1e-12, rtol=0)


@some_layers
def test_the_dense_module_computes_the_same(case, kind):
    built = make(case, kind)
    module, x = dense_module(built.entry, built.layer), built.inputs(3)
    assert isinstance(module, nn.Embedding if kind == "embedding" else nn.Linear)
    torch.testing.assert_close(module(x), built.layer(x), atol=1e-10, rtol=1e-10)


@some_layers
def test_bfloat16_in_bfloat16_out(case, kind):
    built = make(case, kind)
    layer = built.layer.to(torch.bfloat16)
    x = built.inputs(4, dtype=torch.bfloat16)
    out, expected = layer(x).detach(), built.expected(x)
    assert out.dtype == torch.bfloat16
    assert layer.to_dense().dtype == torch.bfloat16
    # Rounding of 2**-9 a number, in a few products, against the size of the result.
    assert float((out.double() - expected).norm()) <= 0.03 * float(expected.norm()) + 1e-2


@some_layers
def test_gradients_reach_every_parameter(case, kind):
    built = make(case, kind)
    x = torch.arange(case.shape[0]) if kind == "embedding" else built.inputs(3).requires_grad_()
    built.layer(x).square().sum().backward()
    for name, parameter in built.layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.numel() == 0 or bool(parameter.grad.any()), name
    assert kind == "embedding" or bool(x.grad.any())


class Doubled(nn.Linear):
    """Stands for an adapter that PEFT wraps around a factor."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@linear_cases
def test_an_adapter_on_a_factor_works_in_both_paths(case):
    built = make(case, "linear")
    x = built.inputs(3)
    plain = built.layer(x)
    for name in case.network.factors:
        child = getattr(built.layer, name)
        adapted = Doubled(1, 1, bias=False)
        adapted.weight, adapted.in_features = child.weight, child.in_features
        setattr(built.layer, name, adapted)
    outputs = []
    for built.layer.crossing in (math.inf, 0):
        outputs.append(built.layer(x))
    torch.testing.assert_close(*outputs, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(outputs[0], plain)


@few_layers
def test_gradients_are_right(case, kind):
    built = make(case, kind)
    x, names = built.inputs(2), [name for name, _ in built.layer.named_parameters()]

    def run(*values: Tensor) -> Tensor:
        return torch.func.functional_call(built.layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, tuple(built.layer.parameters()))


@some_layers
def test_no_einsum_takes_more_than_two_operands(case, kind):
    built = make(case, kind)
    with Products() as seen:
        built.layer(built.inputs(2))
        built.layer(built.inputs(100))
        built.layer.to_dense()
    assert max(seen.operands, default=0) <= 2


def test_the_counter_sees_what_is_multiplied():
    with Products() as seen:
        torch.einsum("ab,bc,c->a", torch.ones(2, 3), torch.ones(3, 4), torch.ones(4))
        F.linear(torch.ones(5, 2), torch.ones(3, 2))
        nn.Linear(2, 3)(torch.ones(1, 2))
        torch.bmm(torch.ones(2, 3, 4), torch.ones(2, 4, 5))
    assert (seen.operands, seen.macs) == ([3], 2 * 3 * 4 + 5 * 2 * 3 + 2 * 3 + 2 * 3 * 4 * 5)


@few_layers
def test_at_most_two_compiles_over_seven_lengths(case, kind):
    torch._dynamo.reset()
    built, counter = make(case, kind), CompileCounter()
    compiled = torch.compile(built.layer, backend=counter, fullgraph=True)
    for length in range(2, 9):
        x = built.inputs(2, length)
        torch.testing.assert_close(compiled(x), built.layer(x), atol=1e-10, rtol=1e-10)
    assert 1 <= counter.frame_count <= 2


@few_layers
def test_export_takes_any_length(case, kind):
    built = make(case, kind)
    length = torch.export.Dim("length", min=2, max=64)
    exported = torch.export.export(
        built.layer, (built.inputs(2, 5),), dynamic_shapes=({1: length},), strict=False
    ).module()
    for tokens in (2, 5, 33):
        x = built.inputs(2, tokens)
        torch.testing.assert_close(exported(x), built.layer(x), atol=1e-10, rtol=1e-10)


@few_layers
def test_a_layer_shows_what_it_is(case, kind):
    shown = repr(make(case, kind).layer)
    assert case.network.equation in shown
