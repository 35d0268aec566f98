from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

import tnlm
from tnlm.decompositions import block_train, get_format
from tnlm.decompositions.base import Ceiling
from tnlm.decompositions.block_train import FORMAT, BlockTrainSpec
from tnlm.errors import RankError
from tnlm.layers.linear import FactorizedLinear
from tnlm.metrics.metric import Elementwise, InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.costs import is_table, macs
from tnlm.tensors.linalg import truncated_svd

seeds = st.integers(0, 20)
pairs = st.tuples(st.integers(1, 4), st.integers(1, 4))
SPEC = BlockTrainSpec(2, (4, 3), (2, 5))


def blocks_of(weight, spec):
    """Return every W[:, b, c, :], cut out one by one."""
    (_, b), (c, d) = spec.out_split, spec.in_split
    return [weight[i::b, j * d : (j + 1) * d] for i in range(b) for j in range(c)]


def rebuilt(weight, metric, spec):
    return FORMAT.reconstruct(tuple(weight.shape), spec, FORMAT.fit(weight, metric, spec))


def moment(gaussian, size, seed=0):
    x = gaussian(2 * size, size, seed=seed)
    return x.T @ x / len(x)


def layer_of(weight, spec, **arguments):
    network = FORMAT.network(tuple(weight.shape), spec)
    layer = FactorizedLinear(network, bias=False, dtype=torch.float64, **arguments)
    return layer.store(FORMAT.fit(weight, Metric(), spec))


@given(out=pairs, inp=pairs, part=st.floats(0, 1), seed=seeds)
def test_every_block_is_its_truncated_svd(out, inp, part, seed, gaussian):
    weight = gaussian(math.prod(out), math.prod(inp), seed=seed)
    spec = BlockTrainSpec(max(1, round(part * min(out[0], inp[1]))), out, inp)
    svds = [truncated_svd(block, spec.rank) for block in blocks_of(weight, spec)]
    approximation = rebuilt(weight, Metric(), spec)
    for svd, block in zip(svds, blocks_of(approximation, spec), strict=True):
        torch.testing.assert_close(svd.u * svd.s @ svd.vh, block, atol=1e-9, rtol=0)
    lost = sum(svd.discarded for svd in svds)
    assert float((weight - approximation).square().sum()) == pytest.approx(lost, abs=1e-9)
    [error] = FORMAT.errors(weight, Metric(), [spec])
    assert error == pytest.approx((lost / float(weight.square().sum())) ** 0.5, abs=1e-7)
    if spec.rank == min(out[0], inp[1]):
        torch.testing.assert_close(approximation, weight, atol=1e-10, rtol=0)


@given(m=st.integers(2, 10), n=st.integers(2, 10), part=st.floats(0, 1), seed=seeds)
def test_one_block_is_low_rank(m, n, part, seed, gaussian):
    weight, rank = gaussian(m, n, seed=seed), max(1, round(part * min(m, n)))
    other, metric = get_format("low-rank"), InputMoment(moment(gaussian, n, seed))
    for form in (Metric(), metric):
        spec = BlockTrainSpec(rank, (m, 1), (1, n))
        plain = other.spec(rank)
        expected = other.reconstruct((m, n), plain, other.fit(weight, form, plain))
        torch.testing.assert_close(rebuilt(weight, form, spec), expected, atol=1e-7, rtol=0)
        assert FORMAT.errors(weight, form, [spec]) == pytest.approx(
            other.errors(weight, form, [plain]), abs=1e-7
        )
    assert FORMAT.network((m, n), spec).params == rank * (m + n)


def test_a_planted_block_train_is_found_and_recovered(gaussian):
    factors = {"left": gaussian(6, 4, 3, 2), "right": gaussian(4, 3, 2, 8, seed=1)}
    spec = BlockTrainSpec(2, (6, 4), (3, 8))
    weight = FORMAT.reconstruct((24, 24), spec, factors)
    # Of all specs that are exact, the smallest.
    assert FORMAT.within(weight, Metric(), {}, 1e-6)[0] == spec
    torch.testing.assert_close(rebuilt(weight, Metric(), spec), weight, atol=1e-9, rtol=0)


@pytest.mark.parametrize("side", ["outputs", "inputs", "both"])
def test_diagonal_sides_are_fitted_exactly(side, gaussian):
    weight = gaussian(12, 10)
    rows, columns = Side(gaussian(12, seed=1) ** 2), Side(gaussian(10, seed=2) ** 2)
    metric = {
        "outputs": Metric(outputs=rows),
        "inputs": Metric(inputs=columns),
        "both": Metric(rows, columns),
    }[side]
    svds = [truncated_svd(block, 2) for block in blocks_of(metric.whiten(weight), SPEC)]
    best = sum(svd.discarded for svd in svds) ** 0.5 / metric.norm(weight)
    assert metric.relative(weight, rebuilt(weight, metric, SPEC)) == pytest.approx(best, abs=1e-9)
    assert FORMAT.errors(weight, metric, [SPEC]) == pytest.approx([best], abs=1e-7)


def metrics(gaussian):
    rows, columns = Side(moment(gaussian, 12, 1)), Side(moment(gaussian, 10, 2))
    return {
        "input": Metric(inputs=columns),
        "output": Metric(outputs=rows),
        "separable": Metric(rows, columns),
        "elementwise": Elementwise(gaussian(12, 10, seed=3) ** 2),
    }


@pytest.mark.parametrize("kind", ["input", "output", "separable", "elementwise"])
def test_a_fit_in_the_metric_is_better_there_and_never_worse_than_reported(kind, gaussian):
    weight, metric = gaussian(12, 10), metrics(gaussian)[kind]
    nearest = metric.relative(weight, rebuilt(weight, Metric(), SPEC))
    fitted = metric.relative(weight, rebuilt(weight, metric, SPEC))
    [reported] = FORMAT.errors(weight, metric, [SPEC])
    assert fitted < 0.95 * nearest
    assert fitted <= reported + 1e-9
    full = BlockTrainSpec(4, SPEC.out_split, SPEC.in_split)
    torch.testing.assert_close(rebuilt(weight, metric, full), weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["input", "output", "separable", "elementwise"])
@pytest.mark.parametrize("tolerance", [1e-9, 0.3, 0.7])
def test_a_tolerance_is_met_in_the_metric(kind, tolerance, gaussian):
    weight, metric = gaussian(12, 10), metrics(gaussian)[kind]
    found = FORMAT.within(weight, metric, {}, tolerance)
    assert found
    for spec in found:
        error = metric.relative(weight, rebuilt(weight, metric, spec))
        assert error <= max(tolerance, 1e-7)


def test_only_the_most_promising_are_measured(gaussian, monkeypatch):
    monkeypatch.setattr(block_train, "FINALISTS", 2)
    weight, metric = gaussian(12, 10), InputMoment(moment(gaussian, 10))
    specs = [BlockTrainSpec(rank, (4, 3), (2, 5)) for rank in (1, 2, 3)]
    errors = FORMAT.errors(weight, metric, specs)
    assert errors[0] == math.inf > errors[1] > errors[2]


@given(
    shape=st.tuples(st.integers(1, 48), st.integers(1, 48)),
    keep=st.floats(0.1, 1.0),
    speed=st.floats(0.2, 2.0),
)
def test_one_more_rank_would_break_the_budget(shape, keep, speed):
    total = math.prod(shape)
    budget = Ceiling(keep * total, speed * total)
    found = FORMAT.candidates(shape, {}, budget)
    assert len(set(found)) == len(found) <= block_train.SPLITS
    assert bool(found) == (min(keep, speed) * total >= sum(shape))
    for spec in found:
        assert FORMAT.network(shape, spec).params <= min(budget.params, budget.macs)
        assert spec.rank * spec.out_split[1] * spec.in_split[0] <= 4 * max(shape)
        if spec.rank < min(spec.out_split[0], spec.in_split[1]):
            more = BlockTrainSpec(spec.rank + 1, spec.out_split, spec.in_split)
            assert not budget.allows(FORMAT.network(shape, more))


def test_square_blocks_come_first():
    found = FORMAT.candidates((96, 64), {}, Ceiling(0.5 * 96 * 64))
    aspects = [spec.out_split[0] / spec.in_split[1] for spec in found]
    assert aspects[:2] == [1.0, 1.0]
    assert [max(x, 1 / x) for x in aspects] == sorted(max(x, 1 / x) for x in aspects)


def test_options_fix_fields_of_the_spec(gaussian):
    options = {"rank": 2, "out_split": [4, 3], "in_split": (2, 4)}
    assert FORMAT.candidates((12, 8), options, Ceiling()) == [BlockTrainSpec(2, (4, 3), (2, 4))]
    assert FORMAT.candidates((12, 8), options, Ceiling(params=10)) == []
    # Small blocks are left out unless they are asked for.
    small = BlockTrainSpec(2, (2, 24), (24, 2))
    asked = {"out_split": small.out_split, "in_split": small.in_split}
    assert FORMAT.candidates((48, 48), asked, Ceiling()) == [small]
    assert small not in FORMAT.candidates((48, 48), {}, Ceiling())
    splits = [(s.out_split, s.in_split) for s in FORMAT.within(gaussian(48, 48), Metric(), {}, 0.5)]
    assert len(splits) == block_train.SPLITS
    assert ((2, 24), (24, 2)) not in splits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 5}, "rank=5; a 6x4 matrix has at most 4 for any allowed split"),
        ({"rank": 3, "out_split": (2, 3)}, "has at most 2"),
        ({"out_split": (4, 2)}, "out_split=\\(4, 2\\) multiplies to 8, not to 6"),
        ({"in_split": (4,)}, "in_split"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(RankError, match=message):
        FORMAT.candidates((6, 4), options, Ceiling())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (BlockTrainSpec(3, (2, 3), (2, 2)), "rank=3, but .* has 2x2 blocks, of rank 1 to 2"),
        (BlockTrainSpec(1, (1, 2, 3), (2, 2)), "two sizes each"),
        (BlockTrainSpec(1, (2, 3), (4,)), "two sizes each"),
    ],
)
def test_specs_that_the_matrix_cannot_have_are_refused(spec, message):
    with pytest.raises(RankError, match=message):
        FORMAT.network((6, 4), spec)


def test_it_is_no_table_and_costs_its_parameters():
    network = FORMAT.network((12, 10), SPEC)
    assert not is_table(network)
    assert macs(network) == network.params == 2 * 3 * 2 * (4 + 5)
    rows = get_format("token-mps")
    assert is_table(rows.network((12, 10), rows.spec((2, 5), (2,))))


@pytest.mark.parametrize("order", [None, ("right", "left"), ("left", "right")])
def test_every_path_equals_the_dense_matrix(order, gaussian):
    weight = gaussian(12, 10)
    layer, dense = layer_of(weight, SPEC, order=order), rebuilt(weight, Metric(), SPEC)
    torch.testing.assert_close(layer.to_dense(), dense, atol=1e-10, rtol=0)
    for lead in [(), (0,), (1,), (2, 3), (2, 0)]:
        x = gaussian(*lead, 10, seed=1)
        for layer.crossing in (math.inf, 0):
            torch.testing.assert_close(layer(x), x @ dense.T, atol=1e-10, rtol=0)


# Not ours: transformers warns about its own names when it enables adapters.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_lora_meets_linears_and_merges(make_model):
    options = {"out_split": (8, 4), "in_split": (4, 8)}
    model = tnlm.compress(make_model("llama"), "btt", targets=["q_proj"], **options)
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights=False)
    ids = torch.arange(3, 19)[None]
    before = model(ids).logits
    adapted = get_peft_model(model, lora)
    adapted(ids, labels=ids).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert any(".left." in name for name in trained)
    assert all(p.grad.any() for p in trained.values())
    expected = adapted(ids).logits
    assert not torch.allclose(expected, before)
    merged = adapted.merge_and_unload()(ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)
