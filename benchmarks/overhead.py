"""A low-rank layer at one token against two `nn.Linear` of the sizes that it stores.

    python benchmarks/overhead.py [--shapes 576x576 1536x576] [--keep-targets 0.8 0.6]
        [--dtypes float32 bfloat16] [--out DIR]

In cache, one layer is called again and again, so that calls and not memory take the time. From
memory, copies that hold 200 MB together are called in a circle. All take turns; times are medians
over the turns, and the ratio is the median of those of single turns.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from random_layers import Shape, random_low_rank
from timing import DTYPES, add_options, speed, table, take_turns, weight_bytes, write
from torch import Tensor, nn

from tnlm.layers.linear import FactorizedLinear

QUICK = {"shapes": ["576x576"], "keep_targets": [0.6], "dtypes": ["float32"], "repeats": 3}
Row = dict[str, Any]


def main() -> None:
    """Measure all cases, then write the table."""
    asked = _arguments()
    rows = []
    with torch.inference_mode():
        for dtype in asked.dtypes:
            for shape in asked.shapes:
                out, inp = map(int, shape.split("x"))
                for keep in asked.keep_targets:
                    layer = random_low_rank((out, inp), keep, DTYPES[dtype])
                    case = {"dtype": dtype, "shape": shape, "keep": keep}
                    rows += [case | row for row in _measure(layer, asked.repeats, asked.bytes)]
    write(asked.out, "overhead", {"rows": rows}, _table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["576x576", "1536x576"], metavar="OUTxIN")
    parser.add_argument("--bytes", type=int, default=200_000_000, help="of all copies of a layer")
    add_options(parser, keep_targets=(0.8, 0.6), repeats=41)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def _measure(layer: FactorizedLinear, repeats: int, held: int) -> list[Row]:
    """Return the microseconds of the layer and of two plain ones, in cache and from memory."""
    dtype = next(layer.parameters()).dtype
    children = [getattr(layer, step.factor) for step in layer.chain.steps]
    first, second = (_plain(child.weight.shape, dtype) for child in children)
    copies = max(2, held // weight_bytes(layer))
    found = []
    for where, count in (("cache", 1), ("memory", copies)):
        x, y, z = (torch.randn(1, 1, n, dtype=dtype) for n in _widths(layer, first, second))
        calls: dict[str, list[Callable[[], object]]] = {"layer": [], "two": []}
        for _ in range(count):
            calls["layer"].append(partial(copy.deepcopy(layer), x))
            pair = copy.deepcopy(first), copy.deepcopy(second)
            calls["two"].append(partial(_both, *pair, y, z))
        times = take_turns(calls, repeats)
        micro = {f"{n}_microseconds": 1e6 * statistics.median(t) for n, t in times.items()}
        ratio = 1 / speed(times, "layer", "two")
        found.append({"from": where, **micro, "ratio": ratio, "turns": len(times["two"])})
    return found


def _widths(layer: FactorizedLinear, *plain: nn.Linear) -> list[int]:
    return [layer.in_features, *(each.in_features for each in plain)]


def _plain(shape: Shape, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)


def _both(first: nn.Linear, second: nn.Linear, y: Tensor, z: Tensor) -> None:
    first(y)
    second(z)


def _table(rows: list[Row]) -> str:
    head = ["dtype", "shape", "kept", "weights from", "layer, µs", "two nn.Linear, µs", "ratio"]
    lines = [
        [
            *(row["dtype"], row["shape"], f"{row['keep']:g}", row["from"]),
            *(f"{row[f'{name}_microseconds']:.1f}" for name in ("layer", "two")),
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    ]
    return table(head, lines)


if __name__ == "__main__":
    main()
