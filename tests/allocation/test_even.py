from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tnlm
from tnlm.errors import BudgetError, OptionError


@settings(max_examples=12)  # an example plans a model; the budget is exact
@given(keep=st.floats(0.45, 0.95))
def test_one_width_that_meets_the_whole_budget(keep, tiny_llama):
    model = tiny_llama(intermediate_size=64)
    decided = tnlm.plan(
        model,
        tnlm.scheme("auto", formats=("channels",), metric="input", allocation="even"),
        keep_targets=keep,
        calibration=[[1, 2, 3, 4, 5, 6, 7, 8]],
        progress=False,
    )
    widths = {layer.spec["width"] for layer in decided.layers if layer.format == "channels"}
    kept = decided.targets_after.params / decided.targets_before.params
    assert len(widths) == 1
    one_more = 2 * 3 * 32 / decided.targets_before.params  # a channel of both blocks
    assert keep - one_more < kept <= keep


def test_matrices_that_stay_dense_bound_the_budget(tiny_llama):
    model = tiny_llama()
    with pytest.raises(BudgetError, match=r"keep_targets=0\.100, but the least possible"):
        tnlm.compress(
            model,
            tnlm.scheme("auto", formats=("channels",), metric="input", allocation="even"),
            keep_targets=0.1,
            calibration=[[1, 2, 3, 4, 5, 6, 7, 8]],
            progress=False,
        )


def test_it_does_not_choose_between_formats(tiny_llama):
    with pytest.raises(OptionError, match="one format for each kind"):
        tnlm.compress(
            tiny_llama(),
            tnlm.scheme("svd", formats=("low-rank", "kronecker"), allocation="even"),
            progress=False,
        )


def test_alone_it_is_uniform(tiny_llama):
    for keep in (0.3, 0.7):
        even, uniform = (
            tnlm.plan(tiny_llama(), tnlm.scheme("svd", allocation=name), keep_targets=keep)
            for name in ("even", "uniform")
        )
        kept = even.targets_after.params / even.targets_before.params
        assert uniform.targets_after.params <= even.targets_after.params
        assert kept <= keep
