"""Speed and size of single layers: every format against `nn.Linear` and against other libraries.

    python benchmarks/layers.py [--shapes 4096x4096 576x576] [--formats low-rank tucker]
        [--keep-targets 0.8 0.6 0.4] [--tokens 1 16 512] [--dtypes float32 bfloat16] [--out DIR]

Weights are random: speed does not depend on values. A spec is the largest of its format that keeps
the share asked for both of the numbers and of the multiply-adds; Kronecker sums, trains and Tucker
split each side into equal modes. Each layer exists in so many copies (at least 2, at most 200, as
many as a model of 7 billion parameters has) that together they hold 200 MB; calls go through them
in a circle, so that weights come from memory as in a model, or from a cache if so many fit there.
All that is compared takes turns in one process; a ratio is the median over the turns.

The shapes measured if none are given are one of Llama-7B and two of SmolLM2; their others are
11008x4096, 4096x11008, 192x576 and 576x1536.

Other libraries run the same modes and ranks, where they are installed (see other_libraries.py).
The last table is what a layer saves for its backward pass.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from other_libraries import OTHERS
from random_layers import SCALE, Shape, one_term, random_factors, random_layer, spec_within
from timing import DTYPES, add_options, speed, table, take_turns, weight_bytes, write
from torch import Tensor, nn

from tnlm.decompositions import get_format
from tnlm.layers.arranged import filled
from tnlm.layers.linear import FactorizedLinear

ROTATED = 200_000_000
"""Bytes that the copies of a layer hold together."""
COPIES = (2, 200)
FORMATS = ("low-rank", "block-train", "tucker", "kronecker", "tensor-train", "kronecker-term")
SHAPES = ("4096x4096", "576x576", "1536x576")
QUICK = {
    "shapes": ["4096x4096", "576x576"],
    "keep_targets": [0.6],
    "tokens": [1, 512],
    "dtypes": ["float32"],
    "repeats": 2,
}
TERMS, SIDE, TOKENS = 8, 1024, 1024
"""The Kronecker sum whose saved activations are counted."""

ARRANGED = "dense, arranged"
"""Dense weights in the order of memory that tnlm's own layers have."""

L = TypeVar("L", bound=nn.Module)
Row = dict[str, Any]
Case = tuple[str, float | None, Any]
"""A format, the share that is kept, and the spec of it."""


def main() -> None:
    """Measure all cases, then write the tables."""
    asked = _arguments()
    rows: list[Row] = []
    with torch.inference_mode():
        for dtype in asked.dtypes:
            for shape in map(_shape, asked.shapes):
                print(f"{dtype} {_by(shape)} ...", file=sys.stderr, flush=True)
                dense = [_dense(shape, DTYPES[dtype])]
                dense += [copy.deepcopy(dense[0]) for _ in range(_copies(dense[0]) - 1)]
                for case in _cases(shape, asked.formats, asked.keep_targets):
                    rows += _measure(dense, case, asked.tokens, asked.repeats)
    saved = _saved_by_all(TERMS, SIDE, TOKENS)
    text = "\n\n".join([*_tables(rows, asked.tokens), _saved_table(saved)])
    write(asked.out, "layers", {"layers": rows, "saved_for_backward": saved}, text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    add_options(parser, keep_targets=(0.8, 0.6, 0.4), repeats=15)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def _cases(shape: Shape, formats: Sequence[str], keeps: Sequence[float]) -> list[Case]:
    cases: list[Case] = []
    for name in formats:
        if name == "kronecker-term":
            cases.append((name, None, one_term(shape)))
        else:
            cases += [(name, keep, spec_within(name, shape, keep)) for keep in keeps]
    return [case for case in cases if case[-1] is not None]


def _measure(
    dense: Sequence[nn.Linear], case: Case, tokens: Sequence[int], repeats: int
) -> list[Row]:
    """Return a row for everything that can run a case, dense first, at each number of tokens."""
    name, keep, spec = case
    shape, dtype = (dense[0].out_features, dense[0].in_features), dense[0].weight.dtype
    network = get_format(name.removesuffix("-term")).network(shape, spec)
    ours = _rotated(partial(random_layer, network, dtype), shape[1], dtype)
    others, missing = _others(name, spec, shape[1], dtype)
    arranged = [filled(layer.weight) for layer in dense]
    contenders = {"dense": dense, ARRANGED: arranged, "tnlm": ours, **others}
    common: Row = {"dtype": str(dtype).removeprefix("torch."), "shape": shape, "format": name}
    common |= {"keep": keep, "spec": str(spec)}
    rows = [common | {"by": by, "error": why} for by, why in missing.items()]
    sizes = {by: weight_bytes(layers[0]) for by, layers in contenders.items()}
    macs = {"dense": 1.0, ARRANGED: 1.0, "tnlm": ours[0].macs / math.prod(shape)}
    for count in tokens:
        x = torch.randn(1, count, shape[1], dtype=dtype)
        calls = {by: [partial(layer, x) for layer in layers] for by, layers in contenders.items()}
        times = take_turns(calls, repeats)
        for by, spent in times.items():
            found: Row = {"by": by, "tokens": count, "macs": macs.get(by), "bytes": sizes[by]}
            found |= {"share_of_bytes": sizes[by] / sizes["dense"]}
            found |= {"seconds": statistics.median(spent), "turns": len(spent)}
            found |= {"speed": speed(times, by, "dense")}
            rows.append(common | found)
    return rows


def _others(
    name: str, spec: Any, width: int, dtype: torch.dtype
) -> tuple[dict[str, list[nn.Module]], dict[str, str]]:
    """Return the layers of other libraries, and why some of them are missing."""
    found, missing = {}, {}
    for by, make in OTHERS.get(name, {}).items():
        try:
            found[by] = _rotated(partial(make, spec, dtype), width, dtype)
        except ImportError:
            missing[by] = "not installed"
        except (RuntimeError, NotImplementedError) as error:  # e.g. a dtype it cannot do
            missing[by] = type(error).__name__
    return found, missing


def _rotated(make: Callable[[], L], width: int, dtype: torch.dtype) -> list[L]:
    first = make().eval()
    # Whatever a layer finds out at its first call is found before it is copied.
    first(torch.zeros(1, 1, width, dtype=dtype))
    return [first, *(copy.deepcopy(first) for _ in range(_copies(first) - 1))]


def _copies(layer: nn.Module) -> int:
    least, most = COPIES
    return max(least, min(most, math.ceil(ROTATED / weight_bytes(layer))))


def _dense(shape: Shape, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter((SCALE * torch.randn(shape)).to(dtype))
    return layer


def _tables(rows: Sequence[Row], tokens: Sequence[int]) -> list[str]:
    """Return a table for every dtype and shape: speed over dense, and milliseconds."""
    head = ["format", "kept", "run by", "kB", "of dense", "MACs"]
    head += [f"{count} token{'s' * (count > 1)}" for count in tokens]
    texts = ["Speed against dense (and milliseconds a call), by tokens in a call."]
    for dtype, shape in dict.fromkeys((row["dtype"], row["shape"]) for row in rows):
        chosen = [row for row in rows if (row["dtype"], row["shape"]) == (dtype, shape)]
        # Dense was measured beside every case; the first time stands for all in the table.
        lines = [_line(group[: len(tokens)], tokens) for group in _groups(chosen)]
        texts += [f"### {_by(shape)}, {dtype}", table(head, lines)]
    return texts


def _groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Return the rows of the same layer together, the dense ones first."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        dense = row["by"] in ("dense", ARRANGED)
        key = row["by"] if dense else (row["format"], row["keep"], row["by"])
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _line(rows: Sequence[Row], tokens: Sequence[int]) -> list[str]:
    first = rows[0]
    keep = "" if first["keep"] is None else f"{first['keep']:g}"
    dense = first["by"] in ("dense", ARRANGED)
    cells = ["", "", first["by"]] if dense else [first["format"], keep, first["by"]]
    if "error" in first:
        return [*cells, *["–"] * 3, *[first["error"]] * len(tokens)]
    cells += [f"{first['bytes'] / 1e3:,.0f}", f"{first['share_of_bytes']:.3f}"]
    cells.append("" if first["macs"] is None else f"{first['macs']:.2f}")
    return cells + [f"{row['speed']:.2f} ({1e3 * row['seconds']:.3g})" for row in rows]


def _saved_by_all(terms: int, side: int, tokens: int) -> Row:
    """Return the bytes that a Kronecker sum saves for its backward pass, and two others beside."""
    root = math.isqrt(side)
    structure = get_format("kronecker")
    spec = structure.spec(terms=terms, out_split=(root, root), in_split=(root, root), gauge=False)
    network = structure.network((side, side), spec)
    factors = random_factors(network)
    layer = FactorizedLinear(network, bias=False).store(factors)
    left, right = (nn.Parameter(factors[name]) for name in ("left", "right"))
    dense = nn.Linear(side, side, bias=False)

    def naive(x: Tensor) -> Tensor:
        split = x.reshape(*x.shape[:-1], root, root)
        return torch.einsum("...cd,tac,tbd->...ab", split, left, right)

    x = torch.randn(1, tokens, side, requires_grad=True)
    weights = [*dense.parameters(), *layer.parameters(), left, right]
    runs: dict[str, Callable[[Tensor], Tensor]]
    runs = {"dense": dense, "tnlm": layer, "one einsum": naive}
    return {by: saved_bytes(partial(run, x), weights) for by, run in runs.items()}


def saved_bytes(run: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """Return the bytes that autograd saves in a call, the weights' own left out.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> saved_bytes(lambda: x.square(), [])
        16
    """
    saved: list[Tensor] = []  # kept alive, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # alive until all is counted, as it would be in training
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    del output
    return sum(size for address, size in storages.items() if address not in known)


def _saved_table(saved: Row) -> str:
    title = (
        f"Saved for the backward pass, input included: {SIDE}x{SIDE}, {TOKENS:,} tokens, float32, "
        f"{TERMS} Kronecker terms."
    )
    return f"{title}\n\n" + table(
        ["run by", "MiB"], [[k, f"{v / 2**20:.1f}"] for k, v in saved.items()]
    )


def _shape(text: str) -> Shape:
    rows, columns = map(int, text.split("x"))
    return rows, columns


def _by(shape: Shape) -> str:
    return f"{shape[0]}x{shape[1]}"


if __name__ == "__main__":
    main()
