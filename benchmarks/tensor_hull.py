r"""Tensor structures against auto's own choices: harm at equal parameters.

Harm is the squared error in auto's metric, which predicts the loss. For each matrix of a few blocks
every structure is fitted at some shares of the parameters, with no more multiply-adds than dense. A
row of OUT is one fit, and a run goes on where it stopped. ``--table`` prints what the rows say.

    python benchmarks/tensor_hull.py MODEL OUT --calibration wiki.valid.raw \
        --blocks 5 15 25 --shares 0.4 0.6 0.8 0.9
    python benchmarks/tensor_hull.py MODEL OUT --table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensor_hull_table import rows_of, tables
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tnlm
from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.uniform import curve_of, stay_dense
from tnlm.decompositions import cp, get_format
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling, Format, matrix_shape
from tnlm.decompositions.cp_fit import largest_terms
from tnlm.decompositions.kronecker_fit import nearest as nearest_sum
from tnlm.decompositions.kronecker_screen import is_low_rank
from tnlm.decompositions.tucker_fit import nearest as nearest_tucker
from tnlm.decompositions.whitening import closed_form, rebuild
from tnlm.errors import BudgetError
from tnlm.metrics.metric import Metric
from tnlm.tensors.costs import macs

SWEEPS, ROUNDS, PARTS = 4, 3, (0.3, 0.7)
"""Sweeps of least squares; rounds of a hybrid, and parts of its parameters in products."""
LOW_RANK, KRONECKER = get_format("low-rank"), get_format("kronecker")


class Fit(dict[str, Any]):
    """Costs and harm of one fit, as a row."""

    @classmethod
    def of(cls, params: int, multiply_adds: int, harm: float, spec: object) -> Fit:
        """Return a row."""
        return cls(params=params, macs=multiply_adds, harm=harm, spec=str(spec))


def kron(weight: Tensor, metric: Metric, most: float) -> Fit | None:
    """Fit the Kronecker sum of the most promising split, low rank apart."""
    spec = promising(weight, metric, most, weight.numel())
    if spec is None:
        return None
    network = KRONECKER.network(matrix_shape(weight), spec)
    splits = spec.out_split, spec.in_split
    start, _ = closed_form(network, weight, metric, nearest_sum(spec.terms, *splits))
    error = als(network, weight, metric, start, sweeps=SWEEPS, stall=0.0).objective[-1]
    return Fit.of(network.params, macs(network), error, spec)


def promising(weight: Tensor, metric: Metric, most: float, most_macs: float) -> Any:
    """Return the spec of the split whose rearranged, whitened matrix has the least tail."""
    found = KRONECKER.candidates(matrix_shape(weight), {}, Ceiling(most, most_macs))
    specs = [s for s in found if not is_low_rank(s.out_split, s.in_split)]
    errors = KRONECKER.errors(weight, metric, specs) if specs else []
    return specs[errors.index(min(errors))] if specs else None


def reshaped(
    structure: Format[Any],
    nearest: Callable[[Any, Tensor], Any],
    weight: Tensor,
    metric: Metric,
    most: float,
) -> Fit | None:
    """Fit a Tucker or CP form of the split whose closed form is the best."""
    shape, best = matrix_shape(weight), None
    for spec in structure.candidates(shape, {}, Ceiling(most, weight.numel())):
        network = structure.network(shape, spec)
        start, error = closed_form(network, weight, metric, partial(nearest, spec))
        if best is None or error < best[0]:
            best = error, spec, network, start
    if best is None:
        return None
    _, spec, network, start = best
    error = als(network, weight, metric, start, sweeps=SWEEPS, stall=0.0).objective[-1]
    return Fit.of(network.params, macs(network), error, spec)


def hybrid(weight: Tensor, metric: Metric, most: float) -> Fit | None:
    """Fit low rank plus a Kronecker sum, each to what the other leaves; the harm never grows."""
    tried = [_hybrid(weight, metric, most, part) for part in PARTS]
    return min(filter(None, tried), key=lambda fit: fit["harm"], default=None)


def _hybrid(weight: Tensor, metric: Metric, most: float, part: float) -> Fit | None:
    shape, weight = matrix_shape(weight), weight.double()
    [low] = LOW_RANK.candidates(shape, {}, Ceiling((1.0 - part) * most, weight.numel()))
    plain = LOW_RANK.network(shape, low)
    left, right = metric.low_rank(weight, low.rank)
    rest = weight - left @ right
    spec = promising(rest, metric, most - plain.params, weight.numel() - macs(plain))
    if spec is None:
        return None
    network = KRONECKER.network(shape, spec)
    split = nearest_sum(spec.terms, spec.out_split, spec.in_split)
    factors, _ = closed_form(network, rest, metric, split)
    for _ in range(ROUNDS):
        left, right = metric.low_rank(weight - rebuild(network, factors), low.rank)
        fit = als(network, weight - left @ right, metric, factors, sweeps=1)
        factors = fit.factors
    costs = network.params + plain.params, macs(network) + macs(plain)
    return Fit.of(*costs, fit.objective[-1], (low.rank, spec))


FITS: dict[str, Callable[[Tensor, Metric, float], Fit | None]] = {
    "kron": kron,
    "hybrid": hybrid,
    "tucker": partial(
        reshaped, get_format("tucker"), lambda spec, t: nearest_tucker(t, spec.ranks)
    ),
    "cp": partial(reshaped, cp.FORMAT, lambda spec, t: largest_terms(t, spec.rank)),
}


class Measure(Allocation):
    """Measures the matrices of some blocks, and leaves all dense."""

    name, title, weighs_loss = "tensor-hull", "measures tensor structures", True

    def __init__(
        self, out: Path, blocks: Sequence[int], shares: Sequence[float], only: Sequence[str]
    ) -> None:
        self.out, self.shares, self.only = out, shares, only
        self.marks = [f".{block}." for block in blocks]

    def allocate(self, problem: Problem) -> list[Any]:
        """Write the missing rows."""
        done = {(row["target"], row["structure"], row["share"]) for row in rows_of(self.out)}
        for target in [*problem.joint, *problem.targets]:
            if not any(mark in target.name for mark in self.marks):
                continue
            weight, metric = target.weight(problem.model), problem.metric(target)
            energy = metric.norm(weight) ** 2
            for structure in problem.formats:
                if (
                    target.kinds & structure.kinds
                    and (target.name, structure.name, 0.0) not in done
                ):
                    curve = curve_of(target, weight, metric, structure, problem.limits, math.inf)
                    points = [
                        (target.cost(net, 4).params, energy * error**2) for _, net, error in curve
                    ]
                    members = [member.name for member in target.members]
                    self._write(
                        target.name,
                        structure.name,
                        0.0,
                        curve=points,
                        members=members,
                        energy=energy,
                        size=target.dense_cost(4).params,
                    )
            if target in problem.joint:
                continue
            for share in self.shares:
                for name in [name for name in self.only if (target.name, name, share) not in done]:
                    start = time.process_time()
                    fit = FITS[name](weight, metric, share * weight.numel()) or Fit()
                    self._write(target.name, name, share, **fit, cpu=time.process_time() - start)
        return [stay_dense(t, t.weight(problem.model), "measured") for t in problem.targets]

    def _write(self, target: str, structure: str, share: float, **values: Any) -> None:
        row = {"target": target, "structure": structure, "share": share} | values
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration")
    parser.add_argument("--cache")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.4, 0.6, 0.8, 0.9])
    parser.add_argument("--only", nargs="+", default=list(FITS), choices=list(FITS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    if given.table:
        print("\n".join(tables(rows_of(given.out))))
        return
    tnlm.register(Measure(given.out, given.blocks, given.shares, given.only))
    model = AutoModelForCausalLM.from_pretrained(given.model)
    with contextlib.suppress(BudgetError):  # a plan in which nothing shrinks is refused
        tnlm.plan(
            model,
            "auto",
            allocation="tensor-hull",
            keep_targets=0.8,
            calibration=given.calibration,
            tokenizer=AutoTokenizer.from_pretrained(given.model),
            max_length=512,
            num_samples=64,
            gradient_samples=16,
            cache_dir=given.cache,
        )


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
