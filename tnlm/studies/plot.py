"""Plots of a model's structure and of its compression, with matplotlib.

Every function draws into ``ax`` or into new axes, and returns them. Values come from
:func:`tnlm.analyze`, :func:`tnlm.truncate_groups`, a plan, a report, or anywhere else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tnlm.errors import OptionError
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report
from tnlm.utils.names import place, shortened
from tnlm.utils.pareto import pareto as pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b6fb6", "#d1742f", "#3f8f5f", "#a23b6b", "#8a7a5f", "#5aa9c4", "#c9a227", "#7b6bb0")
"""Distinct for readers with red-green colour blindness, on white and on black."""

SEQUENTIAL = "viridis"


def energy(
    spectra: Mapping[str, Sequence[float]], ax: Axes | None = None, *, share: float = 0.9
) -> Axes:
    """Plot how much energy the leading directions hold, for one spectrum or several.

    Args:
        spectra: energies by label, such as squared singular values of a weight or eigenvalues of a
            covariance, in any order.
        ax: the axes to draw into.
        share: a dotted line marks where a spectrum reaches this fraction of its energy.

    Raises:
        OptionError: if a spectrum is empty, has a negative energy or none above zero, or if
            matplotlib is missing.

    Example:
        >>> ax = energy({"identity": [1.0] * 10, "rank 1": [1.0] + [0.0] * 9})
        >>> ax.get_xlabel(), len(ax.lines)
        ('share of the directions', 4)
    """
    ax = _axes(ax)
    for (label, values), color in zip(spectra.items(), _cycle(len(spectra)), strict=True):
        found = np.sort(np.asarray(values, dtype=np.float64))[::-1]
        if not len(found) or not np.isfinite(found).all() or found[-1] < 0 or found.sum() <= 0:
            raise OptionError(f"spectrum {label!r}: energies must be finite, >= 0, not all zero")
        kept = np.concatenate([[0.0], np.cumsum(found) / found.sum()])
        ranks = np.arange(len(kept)) / len(found)
        ax.plot(ranks, kept, color=color, label=label, linewidth=2)
        ax.axvline(ranks[int(np.searchsorted(kept, share - 1e-12))], color=color, linestyle=":")
    ax.set(xlabel="share of the directions", ylabel="share of the energy", xlim=(0, 1))
    ax.set_ylim(0, 1.02)
    ax.legend(frameon=False, loc="lower right")
    return ax


def heatmap(
    values: Mapping[str, float], ax: Axes | None = None, *, label: str = "", annotate: bool = True
) -> Axes:
    """Plot one value per matrix as a heatmap: one column per block, one row per kind of matrix.

    Args:
        values: by dotted name. The first number in a name is its block; names without one are in
            column "-". Names joined by "+" share a value.
        ax: the axes to draw into.
        label: label of the colour bar.
        annotate: write the values into the cells, unless there are many.

    Raises:
        OptionError: if there are no values, or if matplotlib is missing.

    Example:
        >>> ax = heatmap({"layers.0.q": 1.0, "layers.1.q": 2.0, "layers.0.v": 3.0}, label="rank")
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['q', 'v']
    """
    if not values:
        raise OptionError("heatmap: no values; give them by the names of matrices")
    ax = _axes(ax)
    values = {member: value for name, value in values.items() for member in name.split("+")}
    places = {name: place(name) for name in values}
    kinds = shortened(list(dict.fromkeys(kind for kind, _ in places.values())))
    blocks = sorted({block for _, block in places.values()})
    grid = np.full((len(kinds), len(blocks)), np.nan)
    rows = {kind: row for row, kind in enumerate(kinds)}
    for name, (kind, block) in places.items():
        grid[rows[kind], blocks.index(block)] = values[name]
    image = ax.imshow(grid, aspect="auto", cmap=SEQUENTIAL, interpolation="nearest")
    ax.set_yticks(range(len(kinds)), list(kinds.values()))
    every = max(1, len(blocks) // 12)
    ticks = range(0, len(blocks), every)
    ax.set_xticks(ticks, ["-" if blocks[t] < 0 else str(blocks[t]) for t in ticks])
    ax.set_xlabel("block")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02).outline.set_visible(False)
    if annotate and grid.size <= 64:
        _annotate(ax, grid)
    return ax


def allocation(plan: Plan | Report, ax: Axes | None = None) -> Axes:
    """Plot the parameters that each block keeps, by kind of matrix, and those it had.

    Raises:
        OptionError: if matplotlib is missing.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> decided = tnlm.plan(LlamaForCausalLM(tiny), "svd", progress=False)
        >>> allocation(decided).get_ylabel()
        'parameters'
    """
    ax = _axes(ax)
    layers = (plan.plan if isinstance(plan, Report) else plan).layers
    places = {layer.name: place(layer.name) for layer in layers}
    kinds = shortened(list(dict.fromkeys(kind for kind, _ in places.values())))
    blocks = sorted({block for _, block in places.values()})
    dense, under = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for (kind, shown), color in zip(kinds.items(), _cycle(len(kinds)), strict=True):
        mine = {places[x.name][1]: x for x in layers if places[x.name][0] == kind}
        kept = {block: layer.after.params for block, layer in mine.items()}
        bottom = [under[block] for block in kept]
        ax.bar(list(kept), list(kept.values()), 0.8, bottom, label=shown, color=color)
        for block, layer in mine.items():
            under[block] += kept[block]
            dense[block] += layer.before.params
    ax.bar(
        blocks,
        [dense[b] for b in blocks],
        0.8,
        fill=False,
        edgecolor="0.5",
        linewidth=0.6,
        label="dense",
    )
    ax.set(xlabel="block", ylabel="parameters")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    return ax


def pareto(
    points: Mapping[str, Sequence[tuple[float, float]]],
    ax: Axes | None = None,
    *,
    dense: tuple[float, float] | None = None,
    lower_is_better: bool = True,
    size: str = "parameters",
    quality: str = "perplexity",
) -> Axes:
    """Plot quality against size for several methods, and mark the Pareto front.

    Args:
        points: ``(size, quality)`` pairs by method.
        ax: the axes to draw into.
        dense: the pair of the dense model.
        lower_is_better: whether a lower quality is better; smaller sizes always are.
        size: label of the sizes.
        quality: label of the qualities.

    Raises:
        OptionError: if there are no points, if one is not finite, or if matplotlib is missing.

    Example:
        >>> ax = pareto({"a": [(1.0, 9.0), (2.0, 5.0)], "b": [(2.0, 7.0)]}, dense=(3.0, 4.0))
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('parameters', 'perplexity')
    """
    every = [point for pairs in points.values() for point in pairs]
    if not every or not all(map(math.isfinite, (x for point in every for x in point))):
        raise OptionError("pareto: give at least one point, with finite sizes and qualities")
    ax = _axes(ax)
    for (label, pairs), color in zip(points.items(), _cycle(len(points)), strict=True):
        xs, ys = zip(*sorted(pairs), strict=True)
        ax.plot(xs, ys, "o-", color=color, label=label, markersize=5, linewidth=1)
    front = {every[index] for index in pareto_front(every, [False, not lower_is_better])}
    xs, ys = zip(*sorted(front), strict=True)
    ax.plot(xs, ys, "o", markersize=11, fillstyle="none", color="0.5", label="Pareto front")
    if dense is not None:
        ax.plot(*dense, "*", markersize=13, color="0.5", label="dense")
        ax.axhline(dense[1], color="0.5", linestyle=":", linewidth=1)
    ax.set(xlabel=size, ylabel=quality)
    ax.legend(frameon=False)
    return ax


def groups(
    reconstruction: Sequence[float],
    scores: Sequence[float],
    ax: Axes | None = None,
    *,
    label: str = "score",
) -> Axes:
    """Plot the effect of dropping each group of singular values on the weights and on a score.

    Args:
        reconstruction: reconstruction error per group, the largest singular values first.
        scores: score of the model without each group.
        ax: the axes to draw into; scores have their own scale on the right.
        label: label of the scores.

    Raises:
        OptionError: if there is not one score per error, or if matplotlib is missing.

    Example:
        >>> groups([3.0, 2.0, 1.0], [9.0, 9.5, 8.0]).get_xlabel()
        'group of singular values that is dropped, the largest first'
    """
    if len(reconstruction) != len(scores) or not len(scores):
        raise OptionError(f"groups: {len(reconstruction)} errors, but {len(scores)} scores")
    ax = _axes(ax)
    indices = np.arange(1, len(scores) + 1)
    ax.bar(indices, reconstruction, color=COLORS[0], alpha=0.7)
    ax.set_ylabel("error of the weights", color=COLORS[0])
    ax.set_xlabel("group of singular values that is dropped, the largest first")
    ax.set_xticks(indices)
    right = ax.twinx()
    right.plot(indices, scores, "o-", color=COLORS[1])
    right.set_ylabel(label, color=COLORS[1])
    right.spines[["top"]].set_visible(False)
    return ax


def shapes(errors: Mapping[tuple[int, int], float], ax: Axes | None = None) -> Axes:
    """Plot the error of a Kronecker sum for every shape of its inner factor.

    Args:
        errors: relative errors by ``(rows, columns)``, as returned by
            :func:`tnlm.studies.analysis.shapes.kronecker_errors`.
        ax: the axes to draw into.

    Raises:
        OptionError: if there are no errors, or if matplotlib is missing.

    Example:
        >>> ax = shapes({(1, 1): 0.0, (1, 2): 0.3, (2, 1): 0.4, (2, 2): 0.7})
        >>> ax.get_xlabel(), ax.get_ylabel()
        ('columns of the inner factor', 'rows')
    """
    if not errors:
        raise OptionError("shapes: no errors; give them by (rows, columns)")
    ax = _axes(ax)
    rows, columns = (sorted({shape[axis] for shape in errors}) for axis in (0, 1))
    grid = np.array([[errors.get((r, c), np.nan) for c in columns] for r in rows])
    image = ax.imshow(grid, aspect="auto", cmap=SEQUENTIAL, origin="lower")
    ax.set_xticks(range(len(columns)), list(map(str, columns)))
    ax.set_yticks(range(len(rows)), list(map(str, rows)))
    ax.set(xlabel="columns of the inner factor", ylabel="rows")
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label="relative error", pad=0.02)
    if grid.size <= 64:
        _annotate(ax, grid)
    return ax


def _axes(ax: Axes | None) -> Axes:
    """Return the axes, or new ones, without a frame."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError(
            "plots need matplotlib, which is not installed: pip install 'tnlm[plot]'"
        ) from error
    # Not pyplot's figure, which would choose a backend and stay in memory.
    made = Figure(figsize=(6.4, 4.0), layout="constrained").subplots() if ax is None else ax
    made.spines[["top", "right"]].set_visible(False)
    return made


def _cycle(count: int) -> list[Any]:
    if count <= len(COLORS):
        return list(COLORS[:count])
    import matplotlib as mpl

    return list(mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.9, count)))


def _annotate(ax: Axes, grid: np.ndarray[Any, Any]) -> None:
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            ax.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
