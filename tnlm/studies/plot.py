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
from tnlm.studies.analysis.result import Analysis
from tnlm.studies.analysis.spectra import Spectrum
from tnlm.studies.analysis.truncation import GroupTruncation
from tnlm.studies.canvas import COLORS, SEQUENTIAL, annotated, axes_of, colors
from tnlm.studies.drawn import by_block, by_group, by_name, grid_of, kept_by
from tnlm.utils.names import place, shortened
from tnlm.utils.pareto import pareto as pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def energy(
    spectra: Spectrum | Mapping[str, Spectrum | Sequence[float]],
    ax: Axes | None = None,
    *,
    share: float = 0.9,
) -> Axes:
    """Plot how much energy the leading directions hold, of one spectrum or several.

    Args:
        spectra: a spectrum of :func:`tnlm.analyze`, or several by label; or energies by label, such
            as squared singular values of a weight or eigenvalues of a covariance, in any order.
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
    ax = axes_of(ax)
    named = {"": spectra} if isinstance(spectra, Spectrum) else spectra
    for (label, values), color in zip(named.items(), colors(len(named)), strict=True):
        kept = kept_by(label, values)
        ranks = np.linspace(0.0, 1.0, len(kept))
        ax.plot(ranks, kept, color=color, label=label or None, linewidth=2)
        ax.axvline(ranks[int(np.searchsorted(kept, share - 1e-12))], color=color, linestyle=":")
    ax.set(xlabel="share of the directions", ylabel="share of the energy", xlim=(0, 1))
    ax.set_ylim(0, 1.02)
    if any(named):
        ax.legend(frameon=False, loc="lower right")
    return ax


def heatmap(
    values: Mapping[str, float] | Plan | Report | Analysis,
    ax: Axes | None = None,
    *,
    label: str = "",
    annotate: bool = True,
) -> Axes:
    """Plot one value per matrix as a heatmap: one column per block, one row per kind of matrix.

    Args:
        values: by dotted name; of a plan or a report, the fraction that each matrix keeps; of an
            analysis, the fraction of its directions that hold 90 % of the energy. The first number
            in a name is its block; names without one are in column "-". Names joined by "+" share
            a value.
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
    named, meaning = by_name(values)
    if not named:
        raise OptionError("heatmap: no values; give them by the names of matrices")
    ax = axes_of(ax)
    grid, kinds, blocks = grid_of(named)
    image = ax.imshow(grid, aspect="auto", cmap=SEQUENTIAL, interpolation="nearest")
    ax.set_yticks(range(len(kinds)), kinds)
    every = max(1, len(blocks) // 12)
    ticks = range(0, len(blocks), every)
    ax.set_xticks(ticks, ["-" if blocks[t] < 0 else str(blocks[t]) for t in ticks])
    ax.set_xlabel("block")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.figure.colorbar(image, ax=ax, label=label or meaning, pad=0.02).outline.set_visible(False)
    if annotate and grid.size <= 64:
        annotated(ax, grid)
    return ax


def features(analyses: Analysis | Mapping[str, Analysis], ax: Axes | None = None) -> Axes:
    """Plot how many directions the features of each block use, of one model or of several.

    A line is the mean, over the matrices of a block, of the fraction of directions that hold 90 %
    of the energy of their centred outputs.

    Args:
        analyses: a result of :func:`tnlm.analyze` with calibration data, or several by label, such
            as those of a model before and after its compression, on the same data.
        ax: the axes to draw into.

    Raises:
        OptionError: if an analysis has no features, or if matplotlib is missing.

    Example:
        >>> import tnlm, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=2, num_attention_heads=2)
        >>> found = tnlm.analyze(LlamaForCausalLM(tiny), torch.arange(64) % 32, max_length=16,
        ...                      progress=False)
        >>> ax = features({"before": found, "after": found})
        >>> [line.get_label() for line in ax.lines]
        ['before', 'after']
    """
    named = {"": analyses} if isinstance(analyses, Analysis) else analyses
    lines = {label: by_block(label, found) for label, found in named.items()}
    ax = axes_of(ax)
    for (label, values), color in zip(lines.items(), colors(len(lines)), strict=True):
        ax.plot(list(values), list(values.values()), "o-", color=color, label=label or None)
    ax.set(xlabel="block", ylabel="directions for 90 % of the energy", ylim=(0, None))
    ax.locator_params(axis="x", integer=True)
    if any(named):
        ax.legend(frameon=False)
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
    ax = axes_of(ax)
    layers = (plan.plan if isinstance(plan, Report) else plan).layers
    places = {layer.name: place(layer.name) for layer in layers}
    kinds = shortened(list(dict.fromkeys(kind for kind, _ in places.values())))
    blocks = sorted({block for _, block in places.values()})
    dense, under = dict.fromkeys(blocks, 0), dict.fromkeys(blocks, 0)
    for (kind, shown), color in zip(kinds.items(), colors(len(kinds)), strict=True):
        mine = {places[x.name][1]: x for x in layers if places[x.name][0] == kind}
        kept = {block: layer.after.params for block, layer in mine.items()}
        bottom = [under[block] for block in kept]
        ax.bar(list(kept), list(kept.values()), 0.8, bottom, label=shown, color=color)
        for block, layer in mine.items():
            under[block] += kept[block]
            dense[block] += layer.before.params
    frame: dict[str, Any] = {"fill": False, "edgecolor": "0.5", "linewidth": 0.6}
    ax.bar(blocks, [dense[b] for b in blocks], 0.8, label="dense", **frame)
    ax.set(xlabel="block", ylabel="parameters")
    ax.locator_params(axis="x", integer=True)
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
    ax = axes_of(ax)
    for (label, pairs), color in zip(points.items(), colors(len(points)), strict=True):
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
    reconstruction: GroupTruncation | Sequence[float],
    scores: Sequence[float] | None = None,
    ax: Axes | None = None,
    *,
    label: str = "score",
) -> Axes:
    """Plot the effect of dropping each group of singular values on the weights and on a score.

    Args:
        reconstruction: the result of :func:`tnlm.truncate_groups`; or the reconstruction error per
            group, the largest singular values first.
        scores: score of the model without each group; not given beside a result.
        ax: the axes to draw into; scores have their own scale on the right.
        label: label of the scores.

    Raises:
        OptionError: if there is not one score per error, if scores are given beside a result, or
            if matplotlib is missing.

    Example:
        >>> groups([3.0, 2.0, 1.0], [9.0, 9.5, 8.0]).get_xlabel()
        'group of singular values that is dropped, the largest first'
    """
    reconstruction, scores = by_group(reconstruction, scores)
    if len(reconstruction) != len(scores) or not len(scores):
        raise OptionError(f"groups: {len(reconstruction)} errors, but {len(scores)} scores")
    ax = axes_of(ax)
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
    ax = axes_of(ax)
    rows, columns = (sorted({shape[axis] for shape in errors}) for axis in (0, 1))
    grid = np.array([[errors.get((r, c), np.nan) for c in columns] for r in rows])
    image = ax.imshow(grid, aspect="auto", cmap=SEQUENTIAL, origin="lower")
    ax.set_xticks(range(len(columns)), list(map(str, columns)))
    ax.set_yticks(range(len(rows)), list(map(str, rows)))
    ax.set(xlabel="columns of the inner factor", ylabel="rows")
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label="relative error", pad=0.02)
    if grid.size <= 64:
        annotated(ax, grid)
    return ax
