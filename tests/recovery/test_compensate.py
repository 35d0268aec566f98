from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.errors import RankError
from tnlm.layers.adapters import Lora
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.metrics.sides import Side
from tnlm.recovery.compensate import concatenate, residual_start, retruncate
from tnlm.tensors.gauge import expand, fix

OUT, IN, K, R = 7, 6, 3, 2


def parts(gaussian, seed=0):
    lora = Lora(gaussian(R, IN, seed=seed), gaussian(OUT, R, seed=seed + 1), scaling=0.7)
    return gaussian(OUT, K, seed=seed + 2), gaussian(K, IN, seed=seed + 3), lora


def metrics(gaussian, seed):
    x, g = gaussian(20, IN, seed=seed + 4), gaussian(20, OUT, seed=seed + 5)
    return [
        Metric(),
        InputMoment(x.T @ x),
        Metric(Side(g.T @ g), Side(x.T @ x)),
        Metric(inputs=Side(x.square().sum(0))),
    ]


@given(seed=st.integers(0, 30))
def test_concatenation_is_exact(seed, gaussian):
    left, right, lora = parts(gaussian, seed)
    merged = left @ right + lora.delta()
    long, wide = concatenate(left, right, lora)
    assert long.shape == (OUT, K + R)
    torch.testing.assert_close(long @ wide, merged)
    network = FORMAT.network((OUT, IN), LowRankSpec(K + R))  # and stays so, gauge-fixed
    full = expand(network, fix(network, {"left": long, "right": wide}))
    torch.testing.assert_close(full["left"] @ full["right"], merged)


@given(seed=st.integers(0, 30), which=st.integers(0, 3), rank=st.sampled_from([None, 1, 5, 6]))
def test_cutting_back_leaves_the_least_error_of_the_rank(seed, which, rank, gaussian):
    left, right, lora = parts(gaussian, seed)
    metric = metrics(gaussian, seed)[which]
    merged, k = left @ right + lora.delta(), rank or K
    short, wide = retruncate(left, right, lora, metric, rank)
    assert short.shape == (OUT, k)
    error = metric.norm(merged - short @ wide)
    tail = float(metric.spectrum(merged)[k:].sum()) ** 0.5
    assert error == pytest.approx(tail, abs=1e-6)
    assert error <= metric.norm(merged - left @ right) + 1e-6 or k < K


@given(seed=st.integers(0, 30), scaling=st.sampled_from([0.5, 1.0, 4.0]))
def test_the_residual_s_best_start(seed, scaling, gaussian):
    weight = gaussian(OUT, IN, seed=seed)
    left, right = Metric().low_rank(weight, K)
    lora = residual_start(weight, left @ right, R, scaling)
    best = torch.linalg.matrix_norm(weight - left @ right - lora.delta())
    tail = torch.linalg.svdvals(weight)[K + R :].norm()
    torch.testing.assert_close(best, tail)
    torch.testing.assert_close(lora.A @ lora.A.T, lora.B.T @ lora.B)


def test_ranks_that_cannot_be(gaussian):
    left, right, lora = parts(gaussian)
    for rank in (0, 7):
        with pytest.raises(RankError, match=f"rank={rank}; a 7x6 matrix allows 1 to 6"):
            retruncate(left, right, lora, Metric(), rank)
        with pytest.raises(RankError, match=f"rank={rank}; a 7x6 matrix allows 1 to 6"):
            residual_start(left @ right, left @ right, rank)
