from __future__ import annotations

import pytest
import torch

from tnlm.decompositions import get_format
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side

FORMATS = ["kronecker", "tucker", "tensor-train", "tensor-ring", "block-train"]


def moment(gaussian, size, seed=0):
    rows = gaussian(2 * size, size, seed=seed)
    return rows.T @ rows / (2 * size)


def product(gaussian, *sizes, seed=0):
    parts = [moment(gaussian, size, seed + k) for k, size in enumerate(sizes)]
    return torch.kron(*parts)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "two-sided"])
def test_a_curve_predicts_what_a_fit_reaches(name, kind, gaussian):
    structure, weight = get_format(name), gaussian(24, 16)
    sides = Side(moment(gaussian, 24)), Side(moment(gaussian, 16, seed=3))
    metric = Metric() if kind == "plain" else Metric(*sides)
    curve = structure.curve(weight, metric, {}, 2.0 * weight.numel())
    assert curve
    for spec, predicted in curve:
        fitted = structure.fit(weight, metric, spec)
        error = metric.relative(weight, structure.reconstruct((24, 16), spec, fitted))
        assert 0 <= predicted <= 1
        assert error <= 1.25 * predicted + 1e-6
        assert predicted <= 2.0 * error + 0.05


def test_the_matrix_is_whitened_once_and_one_spec_is_fitted(gaussian, monkeypatch):
    metric = Metric(Side(moment(gaussian, 24)), Side(moment(gaussian, 16, seed=3)))
    calls, whiten = [], metric.whiten
    monkeypatch.setattr(metric, "whiten", lambda w: calls.append("whiten") or whiten(w))
    structure = get_format("tucker")
    errors = structure.errors
    monkeypatch.setattr(structure, "errors", lambda *a: calls.append(len(a[2])) or errors(*a))
    assert len(structure.curve(gaussian(24, 16), metric, {}, 1e9)) > 5
    assert calls == ["whiten", 1]


def test_a_kronecker_curve_is_exact_under_a_metric_of_the_same_split(gaussian):
    metric = Metric(Side(product(gaussian, 6, 4)), Side(product(gaussian, 4, 4, seed=5)))
    structure, weight = get_format("kronecker"), gaussian(24, 16)
    options = {"out_split": (6, 4), "in_split": (4, 4)}
    for spec, predicted in structure.curve(weight, metric, options, 1e9):
        fitted = structure.fit(weight, metric, spec)
        error = metric.relative(weight, structure.reconstruct((24, 16), spec, fitted))
        assert error == pytest.approx(predicted, rel=1e-6, abs=1e-7)
