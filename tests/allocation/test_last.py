from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnlm.allocation.base import Limits, Problem
from tnlm.allocation.last import ALLOCATION, schedule
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling
from tnlm.errors import BudgetError
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import total
from tnlm.targets.matrix import MatrixTarget


class Blocks(nn.Module):
    """Numbered blocks of one matrix, and a head behind them."""

    def __init__(self, count, size=12, head=0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(count))
        for index, layer in enumerate(self.layers):
            self.layers[index] = nn.ModuleDict({"q": layer})
        self.head = nn.Linear(size, head, bias=False) if head else None

    def problem(self, keep, blocks=None, **limits):
        names = [f"layers.{i}.q" for i in range(len(self.layers))]
        names += ["head"] if self.head is not None else []
        targets = [
            MatrixTarget(name, name, tuple(self.get_submodule(name).weight.shape)) for name in names
        ]
        return Problem(
            self,
            targets,
            [get_format("low-rank")],
            lambda target: Metric(),
            lambda target: 1.0,
            Limits(keep, blocks=blocks, **limits),
        )


def test_the_published_schedule():
    published = {0.9: (8, 0.60), 0.8: (12, 0.46), 0.5: (24, 0.33)}
    for keep, (last, share) in published.items():
        found = schedule(keep, 32)
        assert found[0] == last
        assert share <= found[1] < share + 0.01  # the paper cuts its digits off


@pytest.mark.parametrize(
    ("share", "attention", "feed_forward"),
    [(0.60, 1228, 1791), (0.46, 942, 1373), (0.33, 675, 985)],
)
def test_the_published_ranks_of_a_7b_llama(share, attention, feed_forward):
    # For 0.46 the paper prints 954, which is no rank of that share.
    structure = get_format("low-rank")
    for shape, rank in {
        (4096, 4096): attention,
        (11008, 4096): feed_forward,
        (4096, 11008): feed_forward,
    }.items():
        budget = Ceiling(share * shape[0] * shape[1])
        (spec,) = structure.candidates(shape, {"gauge": False}, budget)
        assert spec.rank == rank


@given(keep=st.floats(0.01, 1.0), blocks=st.integers(1, 80))
def test_any_budget_has_a_schedule_that_meets_it(keep, blocks):
    last, share = schedule(keep, blocks)
    assert 1 <= last <= blocks
    assert 0 < share <= 1.0
    assert (blocks - last) + last * share == pytest.approx(keep * blocks)


@given(keep=st.floats(0.05, 1.0), blocks=st.integers(1, 40), last=st.integers(1, 40))
def test_as_many_blocks_as_asked_are_cut_or_it_says_why_not(keep, blocks, last):
    if last > blocks:
        with pytest.raises(BudgetError, match=f"blocks={last}; .* allowed: 1 to {blocks}"):
            schedule(keep, blocks, last)
    elif 1 - last / blocks >= keep:
        with pytest.raises(BudgetError, match=rf"last {last} of {blocks} blocks.*more than"):
            schedule(keep, blocks, last)
    else:
        found, share = schedule(keep, blocks, last)
        assert found == last
        assert (blocks - last) + last * share == pytest.approx(keep * blocks)


@pytest.mark.parametrize("blocks", [None, 2, 5])
def test_only_the_last_blocks_are_cut_evenly(blocks):
    problem = Blocks(5).problem(0.8, blocks)
    found = ALLOCATION.allocate(problem)
    assert [layer.name for layer in found] == [target.name for target in problem.targets]
    last, share = schedule(0.8, 5, blocks)
    cut = [layer.format is not None for layer in found]
    assert cut == [False] * (5 - last) + [True] * last
    ranks = {layer.spec["rank"] for layer in found[5 - last :]}
    (largest,) = get_format("low-rank").candidates((12, 12), {}, Ceiling(share * 144))
    assert ranks == {largest.rank}
    assert total(layer.after for layer in found).params <= 0.8 * 5 * 144
    assert found[0].note or blocks == 5


@pytest.mark.parametrize("unit", ALLOCATION.units)
def test_what_stands_in_no_block_stays_dense_and_is_paid_for(unit):
    problem = Blocks(4, head=12).problem(0.75, unit=unit)
    found = ALLOCATION.allocate(problem)
    assert [layer.name for layer in found] == [target.name for target in problem.targets]
    assert found[-1].format is None
    price = problem.limits.price
    spent = sum(price(layer.after) for layer in found)
    assert spent <= 0.75 * sum(price(layer.before) for layer in found)


def test_too_much_outside_the_blocks_is_an_error():
    with pytest.raises(BudgetError, match=r"stay dense, and have 0\.9"):
        ALLOCATION.allocate(Blocks(1, head=120).problem(0.5))
    model = Blocks(1, head=12)
    problem = model.problem(0.5)
    lonely = [target for target in problem.targets if target.name == "head"]
    with pytest.raises(BudgetError, match="numbered blocks"):
        ALLOCATION.allocate(Problem(model, lonely, *list(vars(problem).values())[2:6]))


def test_too_few_blocks_say_how_little_is_possible():
    with pytest.raises(BudgetError, match=r"the last 1 of 4 blocks.*more than 0\.75, or cut more"):
        ALLOCATION.allocate(Blocks(4).problem(0.7, 1))
    found = ALLOCATION.allocate(Blocks(4).problem(0.85, 1))
    assert [layer.format for layer in found] == [None, None, None, "low-rank"]
