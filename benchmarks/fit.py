"""Speed and error of fits against full SVDs and other tensor libraries.

    python benchmarks/fit.py [--shapes 1536x576 4096x4096] [--formats low-rank kronecker ...]
        [--repeats N] [--out DIR]

Every library gets the same float32 matrix, modes and ranks, and all of them take turns in one
process. The matrix is random with singular values that fall as 1/sqrt(k), as those of weights do;
``--flat`` takes a Gaussian one, which is the hardest to approximate. Libraries that are not
installed are left out, and the table says so.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fit_peers import PEERS, NotInstalled
from timing import table, write
from torch import Tensor

from tnlm.decompositions import get_format
from tnlm.decompositions.splits import balanced_split
from tnlm.decompositions.whitening import rebuild
from tnlm.metrics.metric import Metric

Row = dict[str, Any]
Fitted = Callable[[], Tensor]

RIVALS = {
    "low-rank": ("torch.linalg.svd", "torch.linalg.svd, float64"),
    "kronecker": ("tensorly", "torchTT", "tntorch"),
    "tensor-train": ("tensorly", "torchTT", "tntorch"),
    "tucker": ("tensorly",),
}
TERMS, TRAIN_RANK, TUCKER_SHARE = 8, 16, 0.5
"""Kronecker terms, both bonds of a train of three cores, and what Tucker keeps of a mode."""


def main() -> None:
    """Measure every format at every shape, then write the table."""
    asked = _arguments()
    rows: list[Row] = []
    for shape in asked.shapes:
        weight = _matrix(shape, asked.flat)
        for name in asked.formats:
            print(f"fitting {name} to {_by(shape)} ...", file=sys.stderr, flush=True)
            rows += _measure(name, weight, asked.repeats)
    spectrum = "gaussian" if asked.flat else "1/sqrt(k)"
    write(asked.out, "fit", {"spectrum": spectrum, "fits": rows}, _text(rows, asked, spectrum))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", type=_shape, nargs="+", default=[(1536, 576), (4096, 4096)])
    parser.add_argument("--formats", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument(
        "--repeats", type=int, default=3, help="turns of each, after one to warm up"
    )
    parser.add_argument("--flat", action="store_true", help="a Gaussian matrix")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def _shape(text: str) -> tuple[int, int]:
    rows, columns = text.split("x")
    return int(rows), int(columns)


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def _matrix(shape: tuple[int, int], flat: bool) -> Tensor:
    """Return a float32 matrix with the wanted spectrum.

    Example:
        >>> s = torch.linalg.svdvals(_matrix((6, 4), flat=False))
        >>> [round(float(x), 3) for x in s / s[0]]
        [1.0, 0.707, 0.577, 0.5]
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator)
    if flat:
        return weight
    least = min(shape)
    left = torch.linalg.qr(torch.randn(shape[0], least, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(shape[1], least, generator=generator)).Q
    return (left * torch.arange(1, least + 1) ** -0.5) @ right.T


def _spec(name: str, shape: tuple[int, int]) -> Any:
    """Return what is fitted: a quarter of the rank, or small bonds between balanced modes."""
    make = get_format(name).spec
    if name == "low-rank":
        return make(rank=max(1, min(shape) // 4), gauge=False)
    modes = 3 if name == "tensor-train" else 2
    out, inp = (tuple(balanced_split(size, modes)) for size in shape)
    if name == "kronecker":
        return make(terms=min(TERMS, out[0] * inp[0]), out_split=out, in_split=inp, gauge=False)
    if name == "tensor-train":
        return make(ranks=(min(TRAIN_RANK, out[0] * inp[0]),) * 2, out_split=out, in_split=inp)
    kept = tuple(max(1, int(TUCKER_SHARE * size)) for size in out + inp)
    return make(ranks=kept, out_split=out, in_split=inp)


def _ours(name: str, spec: Any, weight: Tensor) -> Fitted:
    structure = get_format(name)
    factors = structure.fit(weight, Metric(), spec)
    return lambda: rebuild(structure.network(tuple(weight.shape), spec), factors)


def _double(name: str, spec: Any, weight: Tensor) -> Fitted:
    return PEERS["torch.linalg.svd"](name, spec, weight.double())


def _measure(name: str, weight: Tensor, repeats: int) -> list[Row]:
    """Return a row for everything that can fit a format, ours first."""
    spec = _spec(name, tuple(weight.shape))
    makers: Mapping[str, Any] = {"torch.linalg.svd, float64": _double, **PEERS}
    fits = {"tnlm": partial(_ours, name, spec, weight)}
    fits |= {by: partial(makers[by], name, spec, weight) for by in RIVALS[name]}
    common: Row = {"format": name, "shape": tuple(weight.shape), "spec": str(spec)}
    rows, errors = [], {}
    for by, fit in fits.items():  # also warms each of them up
        try:
            rebuilt = fit()().double()
            errors[by] = float((weight.double() - rebuilt).norm() / weight.double().norm())
        except NotInstalled:
            rows.append(common | {"by": by, "error": "not installed"})
    times: dict[str, list[float]] = {by: [] for by in errors}
    for _ in range(repeats):
        for by, spent in times.items():
            start = time.perf_counter()
            fits[by]()
            spent.append(time.perf_counter() - start)
    for by, spent in times.items():
        ratios = [theirs / ours for theirs, ours in zip(spent, times["tnlm"], strict=True)]
        row: Row = {"by": by, "seconds": statistics.median(spent)}
        row |= {"ours_is_faster": statistics.median(ratios), "relative_error": errors[by]}
        rows.append(common | row)
    return sorted(rows, key=lambda row: list(fits).index(row["by"]))


def _text(rows: list[Row], asked: argparse.Namespace, spectrum: str) -> str:
    head = ["matrix", "format", "fitted by", "seconds", "tnlm is faster", "relative error"]
    lines = []
    for row in rows:
        cells = [_by(row["shape"]), row["format"], row["by"]]
        if "error" in row:
            lines.append([*cells, row["error"], "", ""])
            continue
        faster = "" if row["by"] == "tnlm" else f"{row['ours_is_faster']:.2f} x"
        lines.append([*cells, f"{row['seconds']:.3g}", faster, f"{row['relative_error']:.6f}"])
    flat = " --flat" if asked.flat else ""
    return (
        "# Speed of fitting\n\n"
        f"Weights-only fits of a float32 matrix with {spectrum} singular values, on a 2-core CPU, "
        f"taking turns in one process: `python benchmarks/fit.py{flat} --out DIR`; medians of "
        f"{asked.repeats} turns, and of their ratios.\n\n" + table(head, lines)
    )


if __name__ == "__main__":
    main()
