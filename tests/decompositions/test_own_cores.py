from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.own_cores import Bases, Slice
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

HEIGHT, WIDTH, COUNT = 5, 7, 3
seeds = st.integers(0, 20)
rows, columns = (st.none() | st.integers(1, size - 1) for size in (HEIGHT, WIDTH))


def moment(gaussian, size, seed):
    x = gaussian(3 * size, size, seed=seed)
    return x.T @ x / len(x)


def slices(gaussian, seed, *, outputs=True, inputs=True):
    found = []
    for k in range(COUNT):
        form = Side(moment(gaussian, HEIGHT, seed + k)) if outputs else None
        inner = Side(moment(gaussian, WIDTH, seed + 40 + k)) if inputs else None
        weight = gaussian(HEIGHT, WIDTH, seed=seed + 80 + k)
        found.append((weight, Metric(form, inner)))
    return found


def bases(gaussian, seed, left, right):
    return Bases(
        None if left is None else gaussian(HEIGHT, left, seed=seed),
        None if right is None else gaussian(WIDTH, right, seed=seed + 1),
    )


def rebuilt(found, core):
    tall = core if found.left is None else found.left @ core
    return tall if found.right is None else tall @ found.right.T


def error(pairs, found):
    """Return the squared error of some bases with their best cores."""
    cores = found.cores([Slice.of(*pair) for pair in pairs])
    parts = zip(pairs, cores, strict=True)
    return sum(metric.norm(w - rebuilt(found, core)) ** 2 for (w, metric), core in parts)


@given(seed=seeds, left=rows, right=columns, outputs=st.booleans(), inputs=st.booleans())
def test_the_error_never_rises_and_is_the_true_one(seed, left, right, outputs, inputs, gaussian):
    pairs = slices(gaussian, seed, outputs=outputs, inputs=inputs)
    start = bases(gaussian, seed, left, right)
    found, history = start.improved([Slice.of(*pair) for pair in pairs], 4)
    assert all(b <= a for a, b in pairwise(history))
    assert history[0] == pytest.approx(error(pairs, start), rel=1e-6, abs=1e-8)
    assert history[-1] == pytest.approx(error(pairs, found), rel=1e-6, abs=1e-8)


@given(seed=seeds, left=rows, right=columns)
def test_cores_are_the_best_ones(seed, left, right, gaussian):
    (weight, metric), *_ = slices(gaussian, seed)
    found = bases(gaussian, seed, left, right)
    core = Slice.of(weight, metric).core(found.left, found.right)
    pulled = metric.pull(weight - rebuilt(found, core))  # half the gradient, but for its sign
    half = pulled if found.right is None else pulled @ found.right
    whole = half if found.left is None else found.left.T @ half
    assert float(whole.abs().max()) < 1e-8 * float(metric.pull(weight).abs().max())


@given(seed=seeds, left=rows, right=columns)
def test_what_the_bases_can_hold_is_found(seed, left, right, gaussian):
    made = bases(gaussian, seed, left, right)
    shape = (HEIGHT if left is None else left, WIDTH if right is None else right)
    pairs = [
        (rebuilt(made, gaussian(*shape, seed=seed + k)), metric)
        for k, (_, metric) in enumerate(slices(gaussian, seed))
    ]
    assert error(pairs, made) < 1e-12 * sum(metric.norm(w) ** 2 for w, metric in pairs)


def test_one_slice_comes_near_its_best_low_rank(gaussian):
    weight, metric = slices(gaussian, 3)[0]
    start = bases(gaussian, 3, None, 2)
    _, history = start.improved([Slice.of(weight, metric)], 60)
    best = float(metric.spectrum(weight)[2:].sum())
    assert best * (1 - 1e-9) <= history[-1] <= 1.05 * best


def test_what_was_never_seen_does_no_harm(gaussian):
    silent = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    silent[0, 0] = 1.0
    pairs = [(gaussian(HEIGHT, WIDTH), Metric(inputs=Side(silent)))] * COUNT
    found, history = bases(gaussian, 0, None, 2).improved([Slice.of(*p) for p in pairs], 3)
    assert history[-1] <= 1e-9 * history[0] + 1e-12
    assert all(bool(core.isfinite().all()) for core in found.cores([Slice.of(*p) for p in pairs]))
