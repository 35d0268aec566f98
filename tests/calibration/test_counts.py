"""Counts of tokens over several processes."""

from __future__ import annotations

from tnlm.calibration.gradients import _Gradients
from tnlm.parallel.workers import Workers


class Two(Workers):
    """Two processes that have seen the same."""

    size = 2

    def gather(self, value):
        return [value, value]


def test_tokens_of_all_processes_are_counted_once():
    gradients = _Gradients("full", None, Two())
    gradients._rows["up"] = 3
    gradients.flush(None)
    assert gradients._rows == {"up": 6}
    assert gradients._rows["down"] == 0
