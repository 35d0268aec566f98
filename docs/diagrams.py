"""Tensor networks as pictures in Penrose notation, drawn from a network's own equation.

A node is a factor and a line is a mode. A line between two nodes is summed over, a line upwards
is an output, a line downwards an input. A mode that numbers blocks stands in several factors and in
the matrix as well: its lines meet in a dot, which lets only equal numbers pass.
"""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.tensors.network import Network

NODE, LINE, OUT, INP = "#3b6fb6", "#555555", "#3f8f5f", "#d1742f"
SPACE, LEG = 2.0, 0.95
_MIDDLE = {"ha": "center", "va": "center", "zorder": 4}
_LABEL = {
    "ha": "center",
    "va": "bottom",
    "zorder": 4,
    "bbox": {"facecolor": "white", "linewidth": 0, "pad": 1.0},
}
Point = tuple[float, float]

EXAMPLES: dict[str, tuple[str, tuple[int, int], dict[str, object]]] = {
    "low-rank": ("low-rank", (576, 576), {"rank": 128, "gauge": False}),
    "kronecker": (
        "kronecker",
        (576, 576),
        {"terms": 64, "out_split": [24, 24], "in_split": [24, 24], "gauge": False},
    ),
    "kronecker-rows": ("kronecker-rows", (49152, 576), {"terms": 1, "in_split": [288, 2]}),
    "tucker": (
        "tucker",
        (576, 576),
        {"out_split": [24, 24], "in_split": [24, 24], "ranks": [12, 20, 20, 12]},
    ),
    "tensor-train": (
        "tensor-train",
        (576, 576),
        {"out_split": [8, 8, 9], "in_split": [8, 8, 9], "ranks": [32, 32]},
    ),
    "tensor-ring": (
        "tensor-ring",
        (576, 576),
        {"out_split": [8, 8, 9], "in_split": [8, 8, 9], "ranks": [4, 16, 16]},
    ),
    "block-train": (
        "block-train",
        (576, 576),
        {"rank": 8, "out_split": [24, 24], "in_split": [24, 24]},
    ),
    "token-mps": ("token-mps", (49152, 576), {"in_split": [8, 8, 9], "ranks": [4, 4]}),
}
"""Picture name to a format, a matrix and a spec of it: sizes of SmolLM2-135M."""


def example(name: str) -> Network:
    """Return the network of one of the examples, as the format itself states it."""
    form, shape, options = EXAMPLES[name]
    structure = get_format(form)
    return structure.network(shape, from_dict(structure.spec, options))


def dense() -> Network:
    """Return a matrix as a network of one factor."""
    return Network({"W": "oi"}, "o", "i", {"o": 576, "i": 576})


def gauge() -> Network:
    """Return low rank with an invertible matrix and its inverse on the bond."""
    factors = {"left": "or", "G": "rs", "G⁻¹": "st", "right": "ti"}
    return Network(factors, "o", "i", {"o": 576, "i": 576, "r": 128, "s": 128, "t": 128})


def draw(network: Network) -> Figure:
    """Return the picture of a network."""
    places = _places(network)
    xs, ys = zip(*places.values(), strict=True)
    shared = [_dotted(network, modes) for modes in (network.inp, network.out)]
    low, high = (1.5 + (0.7 if dots else 0.0) for dots in shared)
    left, right, bottom, top = min(xs) - 1.1, max(xs) + 1.1, min(ys) - low, max(ys) + high
    figure = Figure(figsize=(0.85 * (right - left), 0.85 * (top - bottom)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(left, right), ylim=(bottom, top))
    ax.set_aspect("equal")
    ax.axis("off")
    for mode in dict.fromkeys("".join(network.factors.values())):
        _draw_mode(ax, network, places, mode)
    for name, (x, y) in places.items():
        ax.plot(x, y, "o", markersize=36, color=NODE, markeredgecolor="white", zorder=3)
        ax.text(x, y, name, color="white", fontsize=9, **_MIDDLE)
    return figure


def describe(network: Network) -> str:
    """Return a picture in words: its equation, and how many numbers it holds.

    Example:
        >>> describe(dense())
        'oi->oi: 331,776 numbers for a 576x576 matrix of 331,776'
    """
    rows, columns = network.shape
    shape = f"{rows}x{columns} matrix of {rows * columns:,}"
    return f"{network.equation}: {network.params:,} numbers for a {shape}"


def write_all(folder: Path) -> None:
    """Write every picture as ``<name>.svg`` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: example(name) for name in EXAMPLES} | {"dense": dense(), "gauge": gauge()}
    with rc_context({"svg.hashsalt": "tnlm", "svg.fonttype": "none"}):
        for name, network in pictures.items():
            draw(network).savefig(folder / f"{name}.svg", metadata={"Date": None})


def _places(network: Network) -> dict[str, Point]:
    """Return where the nodes stand: in a row, in a ring, or around a core."""
    if "core" not in network.factors:
        modes = list(network.factors.values())
        closing = set(modes[0]) & set(modes[-1]) - set(network.out + network.inp)
        ring = len(modes) > 2 and bool(closing)
        low = dict.fromkeys(range(1, len(modes) - 1), -1.5) if ring else {}
        return {name: (k * SPACE, low.get(k, 0.0)) for k, name in enumerate(network.factors)}
    places: dict[str, Point] = {"core": (0.0, 0.0)}
    for open_modes, height in ((network.out, 1.6), (network.inp, -1.6)):
        names = [n for n, m in network.factors.items() if n != "core" and m[0] in open_modes]
        for k, name in enumerate(names):
            places[name] = ((k - (len(names) - 1) / 2) * SPACE, height)
    return places


def _draw_mode(ax: Axes, network: Network, places: dict[str, Point], mode: str) -> None:
    ends = [places[name] for name, modes in network.factors.items() if mode in modes]
    label = f"{mode} = {network.sizes[mode]:,}"
    thick = 0.8 + 0.3 * math.log2(network.sizes[mode])
    if mode not in network.out + network.inp:
        (x0, y0), (x1, y1) = ends
        ax.plot((x0, x1), (y0, y1), color=LINE, linewidth=thick, zorder=1)
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.14, label, fontsize=8, color=LINE, **_LABEL)
        return
    up = 1 if mode in network.out else -1
    color = OUT if up > 0 else INP
    if len(ends) == 1:
        x, y = ends[0]
        x += _shift(network, mode)
    else:  # a dot where the lines of all factors meet
        x, y = sum(p[0] for p in ends) / len(ends), ends[0][1] + up * 1.0
        for place in ends:
            ax.plot((place[0], x), (place[1], y), color=color, linewidth=thick, zorder=1)
        ax.plot(x, y, "o", markersize=7, color=color, zorder=2)
    ax.plot((x, x), (y, y + up * LEG), color=color, linewidth=thick, zorder=1)
    side = "bottom" if up > 0 else "top"
    ax.text(x, y + up * (LEG + 0.08), label, fontsize=8, color=color, ha="center", va=side)


def _shift(network: Network, mode: str) -> float:
    """Return how far a leg stands from the middle of a node that has several on one side."""
    side = network.out if mode in network.out else network.inp
    [modes] = [modes for modes in network.factors.values() if mode in modes]
    legs = [m for m in modes if m in side and not _dotted(network, m)]
    return 0.5 * (legs.index(mode) - (len(legs) - 1) / 2)


def _dotted(network: Network, modes: str) -> bool:
    """Tell whether any of the modes stands in several factors."""
    return any(sum(m in held for held in network.factors.values()) > 1 for m in modes)
