"""What stacks of matrices lose as third-order Tucker, against low rank of each matrix; resumable.

    python benchmarks/stacks.py MODEL OUT --calibration TEXT [--blocks 5 15 25] [--keep 0.8 0.6]
        [--stacks attention heads blocks feed-forward] [--cache DIR]

Both have the same number of parameters, gauge-fixed, and the same metric: the second moments of
each matrix's inputs and output gradients. Low rank shares the parameters out between the matrices
of a stack as the loss-aware allocation does. ``attention`` stacks the heads of q, k and v of a
layer, k and v, and q and the transposed o; ``heads`` those of one matrix; ``blocks`` a matrix of
attention in two consecutive blocks, and ``feed-forward`` one of the feed-forward layer. Every stack
goes to OUT/stacks.jsonl when it is done; the same command goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import table, write
from torch import Tensor

from tnlm.allocation.curves import Candidate, at_multiplier, least_within, spend_rest
from tnlm.calibration.data import token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.statistics import collect
from tnlm.checkpoint.dense_models import load_model
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, as_tensor
from tnlm.decompositions.hooi import Hosvd
from tnlm.decompositions.whitening import whiten
from tnlm.metrics.metric import Metric
from tnlm.metrics.named import get_measure
from tnlm.metrics.stacked import Stacked
from tnlm.targets.selection import select
from tnlm.tensors.linalg import tails

NAMES = {
    **{name: f"self_attn.{name}_proj" for name in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
KINDS = ("attention", "heads", "blocks", "feed-forward")
WINDOWS, GRADIENTS, LENGTH = 64, 16, 512
"""Windows that moments are taken of, those for gradients, and tokens in each: what `auto` takes."""

Matrix = tuple[Tensor, Metric]
Row = dict[str, Any]


class Stack(NamedTuple):
    """Some matrices, and how many rows a slice of them has."""

    kind: str
    name: str
    matrices: Sequence[Matrix]
    height: int


def main() -> None:
    """Measure what is missing, then write the table."""
    asked = _arguments()
    torch.set_num_threads(1)
    journal = asked.out / "stacks.jsonl"
    asked.out.mkdir(parents=True, exist_ok=True)
    rows = (
        [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    )
    done = {row["name"] for row in rows}
    for stack in _stacks(_Matrices(asked), asked.blocks, asked.stacks, done):
        rows.append({"kind": stack.kind, "name": stack.name, "ratios": measure(stack, asked.keep)})
        print(rows[-1], flush=True)
        with journal.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    write(asked.out, "stacks", {"blocks": asked.blocks, "stacks": rows}, as_text(rows, asked.keep))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 15, 25])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--stacks", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--cache", type=Path, help="keeps the statistics between runs")
    return parser.parse_args()


class _Matrices:
    """The matrices of some blocks of a model in their two-sided metrics."""

    def __init__(self, asked: argparse.Namespace) -> None:
        model, tokenizer = load_model(asked.model)
        names = list(dict.fromkeys(target.module for target in select(model).targets))
        batches = token_batches(
            asked.calibration, tokenizer, num_samples=WINDOWS, max_length=LENGTH, model=model
        )
        self._inputs = collect(model, names, batches, cache_dir=asked.cache)
        few = batches[:GRADIENTS]
        self._gradients = collect_gradients(model, names, few, cache_dir=asked.cache)
        self._model, self.head = model, model.config.head_dim

    def __call__(self, block: int, name: str, *, turned: bool = False) -> Matrix:
        """Return a matrix and its metric, or both transposed."""
        module = f"model.layers.{block}.{NAMES[name]}"
        sources = {"moment": self._inputs, "gradient": self._gradients}
        measure = get_measure("two-sided")
        metric = measure.build(lambda kind: sources[kind].tensor(module, kind), measure.damping)
        weight = self._model.get_submodule(module).weight.detach().double()
        return (weight.T, Metric(metric.inputs, metric.outputs)) if turned else (weight, metric)


def _stacks(
    of: _Matrices, blocks: Sequence[int], kinds: Sequence[str], done: set[str]
) -> Iterator[Stack]:
    """Yield the stacks that are not done."""
    for block in blocks:
        for kind, name, height, parts in _wanted(block, of.head):
            if kind in kinds and name not in done:
                matrices = [of(b, n.rstrip("T"), turned=n.endswith("T")) for b, n in parts]
                yield Stack(kind, name, matrices, height or matrices[0][0].shape[0])


def _wanted(block: int, head: int) -> Iterator[tuple[str, str, int, list[tuple[int, str]]]]:
    """Yield a kind, a name, the rows of a slice (0 for a whole matrix), and the matrices."""
    for several, height in (("q k v", head), ("k v", 0), ("q oT", 0), ("q k v oT", head)):
        yield (
            "attention",
            f"{several}, block {block}",
            height,
            [(block, n) for n in several.split()],
        )
    for name in ("q", "k", "v", "oT"):
        yield "heads", f"heads of {name}, block {block}", head, [(block, name)]
    for kind, names in (("blocks", "qkvo"), ("feed-forward", ("gate", "up", "down"))):
        for name in names:
            yield kind, f"{name}, blocks {block - 1} {block}", 0, [(block - 1, name), (block, name)]


def measure(stack: Stack, keeps: Sequence[float]) -> list[float]:
    """Return the harm of the stack over that of low rank, at every size."""
    weight = torch.cat([weight for weight, _ in stack.matrices])
    metric = Stacked([m for _, m in stack.matrices], [len(w) for w, _ in stack.matrices])
    dims = (len(weight) // stack.height, stack.height, weight.shape[1])
    form, fixed = get_format("stack-tucker"), {"slices": dims[0], "stack": dims[0]}
    whole = Hosvd.of(whiten(as_tensor(weight, dims), metric.modes(dims[:2], dims[2:])))
    ratios = []
    for keep in keeps:
        ceiling = Ceiling(keep * weight.numel())
        specs = form.candidates(tuple(weight.shape), fixed, ceiling)
        spec = min(specs, key=lambda each: whole.error(each.ranks))
        factors = form.fit(weight, metric, spec)
        left = metric.norm(weight - form.reconstruct(tuple(weight.shape), spec, factors)) ** 2
        ratios.append(left / separate(stack.matrices, ceiling.params))
    return ratios


def separate(matrices: Sequence[Matrix], size: float) -> float:
    """Return the least harm of gauge-fixed low rank, or dense, of each matrix in a total size."""
    curves = []
    for weight, metric in matrices:
        left, (rows, columns) = tails(metric.spectrum(weight)).tolist(), weight.shape
        curves.append(
            [Candidate((), r * (rows + columns - r), left[r]) for r in range(1, len(left))]
        )
    largest = max(curve[0].loss for curve in curves)
    chosen = least_within(curves, size, at_multiplier, 1e-30 * largest, 2 * largest)
    return sum(each.loss for each in spend_rest(curves, chosen, size))


def as_text(rows: Sequence[Row], keeps: Sequence[float]) -> str:
    """Return the table: for every kind of stack, its ratios over the blocks."""
    found: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        found.setdefault((row["kind"], row["name"].split(",")[0]), []).append(row["ratios"])
    lines = [
        [kind, name, *(_spread([ratios[k] for ratios in each]) for k in range(len(keeps)))]
        for (kind, name), each in found.items()
    ]
    return table(["kind", "stack", *(f"keep {keep:g}" for keep in keeps)], lines)


def _spread(values: Sequence[float]) -> str:
    mean = statistics.geometric_mean(values)
    return f"{mean:.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
