"""The examples in the benchmarks' docstrings run."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "timing",
        "random_layers",
        "other_libraries",
        "layers",
        "fit",
        "mixture",
        "encoder_channels",
        "mixture_methods",
        "quality",
        "bits",
        "off_grid",
        "decaying",
        "drafting",
    ],
)
def test_examples_in_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
