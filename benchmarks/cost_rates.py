"""Rates of the products and decompositions of a run, and how many operations a matrix takes."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch

from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.tensors.eigen import leading_eigenvectors

EIGEN = 4096
"""The largest width at which eigenvectors are measured; wider, their rate is taken from there."""


def measure(width: int, repeats: int) -> dict[str, float]:
    """Return operations a second of one process's CPU time, of everything a run consists of."""
    generator = torch.Generator().manual_seed(0)
    tall = torch.randn(512, width, generator=generator)
    square = torch.randn(width, width, generator=generator)
    found = {"float32": 2 * 512 * width**2 / spent(lambda: tall @ square, repeats)}
    wide, whole = tall.double(), square.double()
    found["float64"] = 2 * 512 * width**2 / spent(lambda: wide @ whole, repeats)
    gram = whole @ whole.T / width + torch.eye(width).double()
    found["cholesky"] = width**3 / 3 / spent(lambda: torch.linalg.cholesky(gram), repeats)
    if width <= EIGEN:
        values = spent(lambda: torch.linalg.eigvalsh(gram), repeats)
        vectors = spent(lambda: leading_eigenvectors(gram, width // 2), repeats)
        found |= {"eigenvalues": width**3 / values, "eigenvectors": width**3 / vectors}
    return found


def spent(work: Callable[[], object], repeats: int) -> float:
    """Return the least CPU time of some runs, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-6)


def curve_of(rows: int, columns: int) -> dict[str, float]:
    """Return the operations of the errors of one matrix at all ranks, by kind."""
    k, n = sorted((rows, columns))
    products = 2 * k * n**2 + 2 * k**2 * n + 4 * k**3
    return {"float64": products, "cholesky": k**3 / 3, "eigenvalues": k**3}


def fit_of(rows: int, columns: int) -> dict[str, float]:
    """Return the operations of one fit of low rank and of its measured error, by kind."""
    k, n = sorted((rows, columns))
    products = 4 * k * n**2 + 8 * k**2 * n + 4 * k**3
    return {"float64": products, "cholesky": k**3 / 3, "eigenvectors": k**3}


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part)
    return dict(found)


def check(width: int, rates: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Return the counted and the measured seconds of one square matrix."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (torch.randn(width, width, generator=generator) for _ in range(2))
    moment = rows.double().T @ rows.double()
    made = {"plan": curve_of(width, width), "fit": fit_of(width, width)}
    counted = {
        stage: sum(count / rates[kind] for kind, count in work.items())
        for stage, work in made.items()
    }

    def curve() -> None:
        FORMAT.curve(weight, Metric(Side(moment, 0.3), Side(moment, 0.05)), {}, math.inf)

    def fitted() -> None:
        metric = Metric(Side(moment, 0.3), Side(moment, 0.05))
        factors = FORMAT.fit(weight, metric, LowRankSpec(2 * width // 5))
        metric.relative(weight, factors["left"] @ factors["right"])

    found = {"plan": spent(curve, 1), "fit": spent(fitted, 1)}
    return {stage: (counted[stage], found[stage]) for stage in counted}
