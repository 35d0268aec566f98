"""What every published method minimises, shown on the metric and format that its scheme names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlm.decompositions import get_format
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.metrics.named import get_measure
from tnlm.plans.plan import LayerPlan
from tnlm.schemes import get_scheme
from tnlm.targets.matrix import MatrixTarget
from tnlm.tensors.network import Cost

ROWS, COLUMNS, TOKENS = 9, 7, 60
ranks, seeds = st.integers(1, 6), st.integers(0, 15)


@pytest.fixture(scope="session")
def inputs(gaussian):
    """Make correlated inputs ``(tokens, in)`` with a large mean."""

    def make(seed: int = 0, *, mean: float = 3.0):
        mixed = gaussian(TOKENS, COLUMNS, seed=seed) @ gaussian(COLUMNS, COLUMNS, seed=seed + 100)
        return mixed - mixed.mean(0) + mean * gaussian(COLUMNS, seed=seed + 200)

    return make


def statistics(x, **others):
    """Return what calibration gathers from inputs, exactly."""
    found = {"moment": x.T @ x / len(x), "mean": x.mean(0), "magnitude": x.abs().mean(0)}
    return found | others


def metric_of(scheme, gathered, name=None):
    return get_measure(name or get_scheme(scheme).metric).build(gathered.__getitem__, 0.0)


def product(scheme, weight, gathered, rank, name=None):
    """Return the matrix that a scheme puts in place of a weight."""
    [structure] = map(get_format, get_scheme(scheme).formats)
    metric, spec = metric_of(scheme, gathered, name), LowRankSpec(rank, gauge=False)
    return structure.reconstruct(tuple(weight.shape), spec, structure.fit(weight, metric, spec))


def layer_of(scheme, weight, bias, gathered, rank):
    """Return the layer that a scheme puts in place of a linear layer."""
    shape = tuple(weight.shape)
    spec = {"rank": rank, "gauge": False}
    target = MatrixTarget("layer", "layer", shape)
    cost = Cost(0, 0, 0)
    plan = LayerPlan("layer", "linear", shape, "low-rank", spec, cost, cost, bias=bias is None)
    ((_, _, layer),) = target.fit_to(weight, bias, plan, metric_of(scheme, gathered)).pieces
    return layer


def spectrum(matrix):
    return torch.linalg.eigvalsh(matrix).flip(0).clamp_min(0)


def same(one, other, atol=1e-9):
    torch.testing.assert_close(one, other, atol=atol, rtol=0)


# Whitening: SVD-LLM, LLM-ROM, AFM, SFSD


@given(rank=ranks, seed=seeds)
def test_svd_llm_projects_on_the_leading_outputs(rank, seed, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed)
    found = product("svd-llm", weight, statistics(x), rank)
    y = x @ weight.T
    basis = torch.linalg.eigh(y.T @ y)[1][:, -rank:]
    same(found, basis @ basis.T @ weight, 1e-8)
    # ... which is the paper's: truncate W S, undo S, for S the Cholesky factor of the moment.
    root = torch.linalg.cholesky(x.T @ x)
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    same(found, (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root), 1e-8)
    error = float((y - x @ found.T).square().sum())
    assert error == pytest.approx(float(s[rank:].square().sum()), rel=1e-10, abs=1e-10)


@given(rank=ranks, seed=seeds)
def test_rom_projects_on_centred_outputs_and_keeps_the_bias(rank, seed, gaussian, inputs):
    """As published; with metric="input" it is svd-llm."""
    weight, x, bias = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed), gaussian(ROWS)
    gathered = statistics(x)
    found = product("rom", weight, gathered, rank)
    basis = torch.linalg.eigh(torch.cov((x @ weight.T).T))[1][:, -rank:]
    same(found, basis @ basis.T @ weight, 1e-8)
    same(layer_of("rom", weight, bias, gathered, rank).bias.detach(), bias)
    uncentred = product("rom", weight, gathered, rank, "input")
    same(uncentred, product("svd-llm", weight, gathered, rank))
    errors = [(x @ (weight - w).T).square().sum() for w in (uncentred, found)]
    assert errors[0] <= errors[1] + 1e-9


@given(rank=ranks, seed=seeds, biased=st.booleans())
def test_afm_errs_by_the_tail_of_the_centred_spectrum(rank, seed, biased, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed)
    bias = gaussian(ROWS, seed=seed + 1) if biased else None
    y = x @ weight.T + (0 if bias is None else bias)
    layer = layer_of("afm", weight, bias, statistics(x), rank)
    error = float((y - layer(x).detach()).square().sum())
    eigenvalues = spectrum(torch.cov(y.T))  # divided by N - 1
    assert error == pytest.approx((TOKENS - 1) * float(eigenvalues[rank:].sum()), abs=1e-7)
    # No bias can make up for what svd-llm or rom lose to the mean.
    for other in ("svd-llm", "rom", "svd"):
        rest = x @ (weight - product(other, weight, statistics(x), rank)).T
        assert error <= float(rest.square().sum()) + 1e-7


@given(rank=ranks, seed=seeds)
def test_afm_is_its_formula_and_shifts_with_the_bias(rank, seed, gaussian, inputs):
    weight, x, bias = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed), gaussian(ROWS)
    y = x @ weight.T + bias
    mean = y.mean(0)
    basis = torch.linalg.eigh(torch.cov(y.T))[1][:, -rank:]
    layer = layer_of("afm", weight, bias, statistics(x), rank)
    same(layer(x).detach(), (y - mean) @ basis @ basis.T + mean, 1e-8)
    shifted = layer_of("afm", weight, bias + 5.0, statistics(x), rank)
    same(shifted.to_dense().detach(), layer.to_dense().detach())
    same(shifted.bias.detach(), layer.bias.detach() + 5.0)


@given(rank=ranks, seed=seeds)
def test_without_a_mean_afm_is_rom_and_svd_llm(rank, seed, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed, mean=0.0)
    gathered = statistics(x)
    afm = product("afm", weight, gathered, rank)
    same(afm, product("rom", weight, gathered, rank), 1e-8)
    same(afm, product("svd-llm", weight, gathered, rank), 1e-8)
    same(layer_of("afm", weight, None, gathered, rank).bias.detach(), torch.zeros(ROWS).double())


@given(rank=ranks, seed=seeds)
def test_sfsd_puts_the_dropped_mean_into_its_bias(rank, seed, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed)
    y = x @ weight.T
    values, vectors = torch.linalg.eigh(torch.cov(y.T))
    dropped = vectors[:, :-rank]
    layer = layer_of("sfsd", weight, None, statistics(x), rank)
    bias = dropped @ dropped.T @ y.mean(0)  # its code computes zero here
    assert float(bias.norm()) > 1e-6
    same(layer.bias.detach(), bias, 1e-8)
    error = float((y - layer(x).detach()).square().sum())
    assert error == pytest.approx((TOKENS - 1) * float(values[:-rank].sum()), abs=1e-7)


# Diagonal weights: ASVD, FWSVD, TFWSVD


@given(rank=ranks, seed=seeds)
def test_asvd_scales_columns_by_the_root_of_their_magnitude(rank, seed, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed)
    scale = x.abs().mean(0).sqrt()
    u, s, vh = torch.linalg.svd(weight * scale, full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank] / scale
    same(product("asvd", weight, statistics(x), rank), expected)
    flat = statistics(x, magnitude=torch.full((COLUMNS,), 0.3).double())
    same(product("asvd", weight, flat, rank), product("svd", weight, {}, rank))


@given(rank=ranks, seed=seeds)
def test_fwsvd_is_best_under_its_weights_and_not_without(rank, seed, gaussian):
    weight, fisher = gaussian(ROWS, COLUMNS, seed=seed), gaussian(ROWS, COLUMNS, seed=50).square()
    found = product("fwsvd", weight, {"fisher": fisher}, rank)
    plain = product("svd", weight, {}, rank)
    importance = fisher.sum(0)  # of an input, over the outputs

    def weighted(other):
        return float(((weight - other).square() * importance).sum())

    tail = torch.linalg.svdvals(weight * importance.sqrt())[rank:].square().sum()
    assert weighted(found) == pytest.approx(float(tail), rel=1e-9, abs=1e-9)
    assert weighted(found) <= weighted(plain) + 1e-9
    assert (weight - found).norm() >= (weight - plain).norm() - 1e-9
    same(product("fwsvd", weight, {"fisher": 1e-9 * fisher}, rank), found)
    flat = {"fisher": torch.full_like(weight, 0.2)}
    same(product("fwsvd", weight, flat, rank), plain)


@settings(max_examples=10)  # an example is two fits; the inequality is continuous
@given(rank=ranks, seed=seeds)
def test_tfwsvd_improves_on_fwsvd_under_its_own_objective(rank, seed, gaussian):
    weight = gaussian(ROWS, COLUMNS, seed=seed)
    fisher = gaussian(ROWS, COLUMNS, seed=seed + 60).square()

    def objective(scheme):
        found = product(scheme, weight, {"fisher": fisher}, rank)
        return float((fisher * (weight - found).square()).sum())

    assert objective("tfwsvd") <= objective("fwsvd") + 1e-9
    assert objective("tfwsvd") <= objective("svd") + 1e-9
    assert objective("tfwsvd") < 0.99 * objective("svd")


@given(rank=ranks, seed=seeds)
def test_tfwsvd_finds_the_closed_forms_where_they_are_optimal(rank, seed, gaussian):
    weight = gaussian(ROWS, COLUMNS, seed=seed)
    flat = {"fisher": torch.full_like(weight, 0.2)}
    same(product("tfwsvd", weight, flat, rank), product("svd", weight, {}, rank), 1e-6)
    columns = {"fisher": gaussian(COLUMNS, seed=seed + 70).square().add(0.1).expand(ROWS, -1)}
    found = product("tfwsvd", weight, columns, rank)
    same(found, product("fwsvd", weight, columns, rank), 1e-6)


# Two sides: KFAC-SVD


@given(rank=ranks, seed=seeds, scale=st.floats(0.01, 100))
def test_kfac_svd_with_even_gradients_is_svd_llm(rank, seed, scale, gaussian, inputs):
    weight, x = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed)
    even = statistics(x, gradient=scale * torch.eye(ROWS).double())
    same(product("kfac-svd", weight, even, rank), product("svd-llm", weight, even, rank), 1e-8)


@given(rank=ranks, seed=seeds)
def test_kfac_svd_is_best_under_both_sides(rank, seed, gaussian, inputs):
    weight, x, g = gaussian(ROWS, COLUMNS, seed=seed), inputs(seed), gaussian(40, ROWS, seed=seed)
    gathered = statistics(x, gradient=g.T @ (g * torch.arange(1, ROWS + 1)) / 40)
    gathered["gradient"] = gathered["gradient"] @ gathered["gradient"].T
    metric = metric_of("kfac-svd", gathered)
    error = metric.norm(weight - product("kfac-svd", weight, gathered, rank)) ** 2
    tail = float(spectrum(metric.whiten(weight).T @ metric.whiten(weight))[rank:].sum())
    assert error == pytest.approx(tail, rel=1e-7, abs=1e-7 * metric.norm(weight) ** 2)
    for other in ("svd", "svd-llm"):
        rest = metric.norm(weight - product(other, weight, gathered, rank)) ** 2
        assert error <= rest * (1 + 1e-9)


# Embeddings: ALBERT


@given(rank=ranks, seed=seeds)
def test_alberts_embedding_errs_by_the_tail(rank, seed, gaussian):
    table = gaussian(20, 6, seed=seed)
    found = product("albert", table, {}, rank)
    tail = torch.linalg.svdvals(table)[rank:].square().sum().sqrt()
    assert float((table - found).norm()) == pytest.approx(float(tail), abs=1e-9)
