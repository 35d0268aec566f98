r"""Whether attention or an MLP could become one low-rank linear map, against auto's own choices.

The map of least harm from the inputs of a sub-layer to its outputs, ``M x + b``, follows from their
moments; harm is the squared error in auto's metric at the outputs, which predicts the loss. It is
added to the curves of `auto` at all ranks, rank 0 being the mean alone, and the budget is shared
out with and without it. Only predicted losses are compared: nothing is fitted. Sub-layers and
their matrices must have Llama's names.

    python benchmarks/linear_sublayers.py MODEL --calibration wiki.valid.raw --keep-targets 0.8 0.6
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import tnlm
from tnlm.allocation.base import Allocation, Problem
from tnlm.allocation.candidate import Candidate
from tnlm.allocation.curves import Curve, check_budget, curves
from tnlm.allocation.loss import least_loss
from tnlm.allocation.uniform import stay_dense
from tnlm.calibration.data import token_batches
from tnlm.errors import BudgetError, TargetError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.targets.base import Target

PARTS = {"self_attn": ("q_proj", "o_proj"), "mlp": ("gate_proj", "down_proj")}
"""For each sub-layer, the matrix that has its inputs and the one that has its outputs."""
RANKS, RIDGE = 48, 1e-4
"""Ranks tried for each; the damping of the inputs' moment."""
TAKEN = "linear-map"


class Moments:
    """Sums of ``[1, x, y] [1, x, y]^T`` over tokens, of inputs x and outputs y of a sub-layer."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self._inputs = torch.empty(0)

    def watch(self, first: nn.Module, last: nn.Module) -> list[Any]:
        """Return the handles of hooks on the matrices with the inputs and the outputs."""
        return [
            first.register_forward_hook(lambda _, inputs, __: self._see_inputs(inputs[0])),
            last.register_forward_hook(lambda _, __, outputs: self._see_outputs(outputs)),
        ]

    def _see_inputs(self, inputs: Tensor) -> None:
        self._inputs = inputs.reshape(-1, inputs.shape[-1])

    def _see_outputs(self, outputs: Tensor) -> None:
        flat = outputs.reshape(-1, outputs.shape[-1])
        rows = torch.cat([torch.ones_like(flat[:, :1]), self._inputs, flat], 1).detach().double()
        self.total = self.total + rows.T @ rows

    def harms(self, outputs: Side) -> Tensor:
        """Return the harm of the best maps of rank 0, 1, ..., with bias."""
        assert isinstance(self.total, Tensor)
        mean = self.total / self.total[0, 0]
        moment = mean[1:, 1:] - mean[1:, :1] @ mean[:1, 1:]
        size = len(moment) - len(outputs.values)
        inputs = Side(moment[:size, :size], RIDGE)
        full = torch.linalg.solve(inputs.values, moment[:size, size:]).T
        left = moment[size:, size:] - full @ moment[:size, size:]
        tails = Metric(outputs, inputs).spectrum(full).clamp_min(0).flip(0).cumsum(0).flip(0)
        return max(outputs.inner(left), 0.0) + torch.cat([tails, tails.new_zeros(1)])


def moments_of(model: nn.Module, batches: Iterable[Any]) -> dict[str, Moments]:
    """Return the moments of every sub-layer, by name, from a pass over the batches.

    Raises:
        TargetError: if sub-layers or their matrices have other names than Llama's.
    """
    ends = _ends(model)
    found = {name: Moments() for name in ends}
    handles = [handle for name in ends for handle in found[name].watch(*ends[name])]
    for batch in batches:
        model(input_ids=batch["input_ids"], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def _ends(model: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Return the matrices with the inputs and the outputs of every sub-layer, by its name."""
    found: dict[str, tuple[nn.Module, nn.Module]] = {}
    for name, module in model.named_modules():
        names = PARTS.get(name.rpartition(".")[2], ())
        missing = [one for one in names if not hasattr(module, one)]
        if missing:
            raise TargetError(
                f"{name} has no {missing[0]}; the sub-layers must have Llama's names: {PARTS}"
            )
        if names:
            first, last = (module.get_submodule(one) for one in names)
            found[name] = first, last
    if not found:
        raise TargetError(f"no {' or '.join(PARTS)} in the model; sub-layers must have these names")
    return found


class WithMaps(Allocation):
    """Compares budgets with and without maps, and leaves all dense."""

    name, title, weighs_loss = "with-maps", "compares linear sub-layers", True

    def __init__(self, moments: dict[str, Moments], keeps: Sequence[float]) -> None:
        self.moments, self.keeps = moments, keeps
        self.rows: list[dict[str, Any]] = []

    def allocate(self, problem: Problem) -> list[Any]:
        """Keep a row for each budget."""
        found = curves(problem)
        more = [self._with_map(problem, curve) for curve in found]
        for keep in self.keeps:
            budget = check_budget(
                replace(problem, limits=replace(problem.limits, keep=keep)), found
            )
            plain, mapped = least_loss(found, budget), least_loss(more, budget)
            taken = {c.layers[0].name: c.price for c in mapped if c.layers[0].note == TAKEN}
            self.rows.append(
                {
                    "keep_targets": keep,
                    "loss": sum(c.loss for c in plain),
                    "loss_with_maps": sum(c.loss for c in mapped),
                    "maps": taken,
                }
            )
        return [stay_dense(t, t.weight(problem.model), "measured") for t in problem.targets]

    def _with_map(self, problem: Problem, curve: Curve) -> Curve:
        """Return a curve with the maps of its sub-layer, if it is the curve of one."""
        names = [layer.name for layer in curve[-1].layers]
        own = next((n for n in self.moments if all(o.startswith(n + ".") for o in names)), None)
        if own is None or len(names) == 1:
            return curve
        last = _target(problem, f"{own}.{PARTS[own.rpartition('.')[2]][1]}")
        outputs = problem.metric(last).outputs
        assert outputs is not None
        harms, size = self.moments[own].harms(outputs), last.shape[0]
        layer = replace(curve[-1].layers[0], name=own, note=TAKEN)
        maps = [
            Candidate((layer,), rank * (2 * size - rank) + size, float(harms[rank]))
            for rank in range(0, size, max(1, size // RANKS))
        ]
        return sorted([*curve, *maps], key=lambda c: (c.price, c.loss))


def _target(problem: Problem, name: str) -> Target:
    return next(target for target in problem.targets if target.name == name)


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the Markdown table."""
    lines = ["| targets kept | predicted loss | with maps | maps taken |", "|---|---|---|---|"]
    for row in rows:
        taken = ", ".join(row["maps"]) or "none"
        lines.append(
            f"| {row['keep_targets']:g} | {row['loss']:.4g} | {row['loss_with_maps']:.4g} "
            f"| {taken} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.9, 0.8, 0.6, 0.4])
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--map-samples", type=int, default=16, help="windows for the maps")
    parser.add_argument("--gradient-samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--cache", help="folder of calibration statistics")
    parser.add_argument("--out", type=Path, help="file of the rows, as JSON")
    asked = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(asked.model)
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    cut = {"num_samples": asked.num_samples, "max_length": asked.window}
    drawn = token_batches(
        asked.calibration, tokenizer, **(cut | {"num_samples": asked.map_samples})
    )
    study = WithMaps(moments_of(model, drawn), asked.keep_targets)
    tnlm.register(study)
    try:
        tnlm.plan(
            model,
            "auto",
            allocation=study.name,
            keep_targets=asked.keep_targets[0],
            calibration=asked.calibration,
            tokenizer=tokenizer,
            gradient_samples=asked.gradient_samples,
            cache_dir=asked.cache,
            **cut,
        )
    except BudgetError:  # a plan in which nothing shrinks is refused, after all rows are made
        if len(study.rows) < len(asked.keep_targets):
            raise
    finally:
        tnlm.unregister(study)
    if asked.out:
        asked.out.write_text(json.dumps(study.rows, indent=1) + "\n")
    print(as_text(study.rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
