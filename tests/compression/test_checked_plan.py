"""A plan is checked before anything is fitted."""

from __future__ import annotations

import pytest

from tnlm.allocation.base import Limits
from tnlm.compression.checked_plan import check_worth
from tnlm.errors import BudgetError
from tnlm.plans.plan import Plan
from tnlm.tensors.network import Cost


def test_a_plan_that_leaves_every_target_alone_says_why():
    skipped = {"model.q_proj": "it is offloaded", "model.k_proj": "it is shared"}
    empty = Plan("svd", "identity", {}, (), Cost(8, 32, 8), skipped)
    with pytest.raises(BudgetError, match=r"left alone: model\.q_proj: it is offloaded"):
        check_worth(empty, Limits(0.5))
