"""What plots share: axes without a frame, and colours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tnlm.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#3b6fb6", "#d1742f", "#3f8f5f", "#a23b6b", "#8a7a5f", "#5aa9c4", "#c9a227", "#7b6bb0")
"""Distinct for readers with red-green colour blindness, on white and on black."""

SEQUENTIAL = "viridis"


def axes_of(ax: Axes | None) -> Axes:
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


def colors(count: int) -> list[Any]:
    """Return as many colours, distinct where there are few."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    import matplotlib as mpl

    return list(mpl.colormaps[SEQUENTIAL](np.linspace(0, 0.9, count)))


def annotated(ax: Axes, grid: np.ndarray[Any, Any]) -> None:
    """Write the values of a grid into its cells."""
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), value in np.ndenumerate(grid):
        if np.isfinite(value):
            color = "white" if value < middle else "black"
            ax.text(column, row, f"{value:.3g}", ha="center", va="center", fontsize=8, color=color)
