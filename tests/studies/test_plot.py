"""Pictures: what is drawn is what was given, and bad input says what is wrong."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

import tnlm
from tnlm import plot
from tnlm.errors import OptionError
from tnlm.studies.analysis.spectra import Spectrum

BARS = {"layers.0.q": 1.0, "layers.1.q": 2.0, "layers.0.v": 3.0, "head": 4.0}


def test_plot_is_found_without_an_import_of_its_own():
    assert tnlm.plot is plot
    assert "plot" in dir(tnlm)


@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=30))
def test_energy_rises_to_one_and_the_line_stands_where_the_share_is_reached(values):
    curve, line = plot.energy({"w": values}, share=0.9).lines
    kept = curve.get_ydata()
    assert kept[0] == 0
    assert kept[-1] == pytest.approx(1)
    assert (np.diff(kept) >= -1e-12).all()
    count = round(line.get_xdata()[0] * len(values))
    assert kept[count] >= 0.9 - 1e-9
    assert count == 0 or kept[count - 1] < 0.9


def test_a_heatmap_has_a_row_for_each_kind_and_a_gap_where_there_is_nothing():
    ax = plot.heatmap(BARS, label="rank")
    (image,) = ax.images
    grid = image.get_array().filled(np.nan)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["layers.q", "layers.v", "head"]
    expected = [[np.nan, 1, 2], [np.nan, 3, np.nan], [4, np.nan, np.nan]]  # block -1 holds the head
    np.testing.assert_equal(grid, np.array(expected))
    assert len(ax.texts) == 4
    assert not plot.heatmap(BARS, annotate=False).texts


@pytest.mark.parametrize("what", ["plan", "report"])
def test_allocation_stacks_what_every_matrix_keeps(what, compressed):
    report = tnlm.report(compressed("llama", "svd", keep_targets=0.5))
    layers = report.plan.layers
    ax = plot.allocation(report.plan if what == "plan" else report)
    *kinds, dense = ax.containers
    kept = sum(bar.get_height() for kind in kinds for bar in kind)
    assert kept == sum(layer.after.params for layer in layers)
    assert sum(bar.get_height() for bar in dense) == sum(layer.before.params for layer in layers)
    assert [kind.get_label() for kind in kinds][:2] == ["self_attn.q_proj", "self_attn.k_proj"]
    tops = {bar.get_x(): bar.get_y() + bar.get_height() for bar in kinds[-1]}
    assert sum(tops.values()) == kept  # each stands on the one before


def test_what_was_decided_together_stands_in_its_own_row_or_in_each():
    joint = {"h.0.a.up+h.0.a.down": 2.0, "h.0.b": 1.0}
    ax = plot.heatmap(joint)
    (image,) = ax.images
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a.up", "a.down", "b"]
    assert image.get_array().tolist() == [[2.0], [2.0], [1.0]]


def test_pareto_marks_the_front_and_the_dense_model():
    points = {"a": [(2.0, 5.0), (1.0, 9.0)], "b": [(2.0, 7.0)]}
    ax = plot.pareto(points, dense=(3.0, 4.0))
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["a"] == [[1, 9], [2, 5]]
    assert lines["Pareto front"] == [[1, 9], [2, 5]]
    assert lines["dense"] == [[3, 4]]


def test_groups_and_shapes_draw_what_is_given():
    ax = plot.groups([3.0, 1.0], [9.0, 8.0], label="perplexity")
    assert [bar.get_height() for bar in ax.patches] == [3, 1]
    right = ax.figure.axes[1]
    assert right.lines[0].get_ydata().tolist() == [9, 8]
    assert right.get_ylabel() == "perplexity"
    (image,) = plot.shapes({(1, 2): 0.3, (4, 2): 0.7}).images
    assert image.get_array().tolist() == [[0.3], [0.7]]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_groups_take_arrays_and_tensors(kind):
    ax = plot.groups(kind([3.0, 2.0, 1.0]), kind([9.0, 9.5, 8.0]))
    assert [bar.get_height() for bar in ax.patches] == [3, 2, 1]
    assert list(ax.figure.axes[1].lines[0].get_ydata()) == [9, 9.5, 8]


def test_they_draw_into_axes_that_are_given():
    ax = Figure().subplots()
    for draw in (
        lambda: plot.energy({"w": [1.0]}, ax),
        lambda: plot.heatmap(BARS, ax),
        lambda: plot.pareto({"a": [(1, 1)]}, ax),
        lambda: plot.groups([1.0], [1.0], ax),
        lambda: plot.shapes({(1, 1): 0.0}, ax),
    ):
        assert draw() is ax


def test_what_cannot_be_drawn_is_refused(monkeypatch):
    for draw, message in (
        (lambda: plot.energy({"w": []}), "spectrum 'w'"),
        (lambda: plot.energy({"w": [1.0, float("nan")]}), "finite"),
        (lambda: plot.energy({"w": [-1.0, 2.0]}), ">= 0"),
        (lambda: plot.heatmap({}), "no values"),
        (lambda: plot.pareto({"a": []}), "at least one point"),
        (lambda: plot.pareto({"a": [(1.0, float("inf"))]}), "finite size"),
        (lambda: plot.groups([1.0], []), "1 errors, but 0 scores"),
        (lambda: plot.groups([1.0]), "1 errors, but 0 scores"),
        (lambda: plot.shapes({}), "no errors"),
    ):
        with pytest.raises(OptionError, match=message):
            draw()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"pip install 'tnlm\[plot\]'"):
        plot.shapes({(1, 1): 0.0})


def test_every_plot_takes_what_the_library_returns(compressed, tiny_llama):
    found = tnlm.analyze(tiny_llama(), targets=["up_proj"], progress=False)
    spectrum = found.weights[0].spectrum
    curve = plot.energy(spectrum).lines[0].get_ydata()
    assert (curve[0], curve[-1]) == (0, pytest.approx(1))
    assert (np.diff(curve) >= 0).all()
    named = {row.name: row.spectrum for row in found.weights}
    assert len(plot.energy(named).lines) == 2 * len(named)
    ratios = plot.heatmap(found).images[0].get_array().ravel().tolist()
    assert ratios == [row.spectrum.ratio90 for row in found.weights]
    report = tnlm.report(compressed("llama", "svd", keep_targets=0.5))
    for result in (report, report.plan):
        kept = plot.heatmap(result).images[0].get_array().ravel().tolist()
        assert sorted(kept) == sorted(layer.keep for layer in report.plan.layers)
    dropped = tnlm.truncate_groups(tiny_llama(), lambda _: 1.0, groups=3, progress=False)
    heights = [bar.get_height() for bar in plot.groups(dropped).patches]
    assert heights == [row.error for row in dropped.rows]
    with pytest.raises(OptionError, match="leave out scores="):
        plot.groups(dropped, [1.0, 2.0, 3.0])


def test_a_spectrum_without_its_curve_is_refused():
    bare = Spectrum(1, 1.0, 1.0, 1, 1, 1, 1.0, 1.0)
    with pytest.raises(OptionError, match="earlier version"):
        plot.energy({"w": bare})
