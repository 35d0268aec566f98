from __future__ import annotations

import pytest
import torch

import tnlm
from tnlm.decompositions import get_format
from tnlm.metrics.metric import Metric
from tnlm.studies.analysis.curves import curve_rows
from tnlm.targets.matrix import MatrixTarget

FORMATS = ("low-rank", "kronecker", "tensor-train")


def rows_of(weight, formats, **metrics):
    target = MatrixTarget("w", "w", tuple(weight.shape))
    structures = [get_format(name) for name in formats]
    return list(curve_rows(target, weight, structures, metrics or {"identity": Metric()}, 2.0))


def test_curves_are_smaller_than_the_matrix_and_fall(gaussian):
    weight = gaussian(16, 24)
    rows = rows_of(weight, FORMATS)
    assert {row.format for row in rows} == set(FORMATS)
    for row in rows:
        assert row.params < weight.numel()
        assert row.keep == row.params / weight.numel()
        assert row.macs <= weight.numel()
        assert row.damage == pytest.approx((1 - row.keep) * 2.0)
        assert 0.0 <= row.error <= 1.0 + 1e-9
    low_rank = [row.error for row in rows if row.format == "low-rank"]
    assert low_rank == sorted(low_rank, reverse=True)


def test_errors_of_low_rank_are_the_tails_of_the_spectrum(gaussian):
    weight = gaussian(9, 12)
    energy = torch.linalg.svdvals(weight).square()
    for row in rows_of(weight, ["low-rank"]):
        tail = float(energy[row.spec["rank"] :].sum() / energy.sum())
        assert row.error == pytest.approx(tail**0.5)


def test_a_format_for_other_targets_is_passed_over(gaussian):
    assert rows_of(gaussian(8, 8), ["token-mps"]) == []


def test_embeddings_have_curves_too(tiny_llama):
    found = tnlm.analyze(
        tiny_llama(), targets=["embed_tokens"], formats=["low-rank", "kronecker-rows"]
    )
    assert {row.format for row in found.curves} == {"low-rank", "kronecker-rows"}
    assert all(row.spec["gauge"] is False for row in found.curves if row.format == "low-rank")
