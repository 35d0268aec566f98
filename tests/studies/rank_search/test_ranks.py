import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions.low_rank import FORMAT, LowRankSpec
from tnlm.errors import BudgetError
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.studies.nested_ranks import NestedRanks
from tnlm.studies.rank_search.budget import Choice, choose
from tnlm.studies.rank_search.ranks import CANDIDATES, MatrixRanks, RankFits
from tnlm.targets.matrix import MatrixTarget

SIZES = st.integers(6, 24)


@pytest.mark.parametrize("gauge", [False, True])
@pytest.mark.parametrize("data", [False, True])
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99))
def test_smaller_factors_are_slices_and_as_good_as_a_fit_of_their_own(
    rows, columns, seed, data, gauge, gaussian
):
    weight = gaussian(rows, columns, seed=seed)
    x = gaussian(50, columns, seed=seed + 1)
    metric = InputMoment(x.T @ x / 50) if data else Metric()
    matrix = MatrixRanks.of(MatrixTarget("a", "a", (rows, columns)), CANDIDATES, gauge=gauge)
    nested = NestedRanks(weight, metric, matrix.ranks[-1], gauge=gauge)
    fits, errors = RankFits(matrix, weight, None, metric), []
    for rank in matrix.ranks:
        large, small = nested.factors(matrix.ranks[-1]), nested.factors(rank)
        assert torch.equal(small["left"], large["left"][:, :rank])
        assert torch.equal(small["right"], large["right"][:rank])
        fitted = fits.at(rank)
        own = FORMAT.fit(weight, metric, LowRankSpec(rank, gauge))
        best = metric.relative(weight, own["left"] @ own["right"])
        assert fitted.layer.error == pytest.approx(best, rel=1e-6, abs=1e-9)
        errors.append(fitted.layer.error)
        built = sum(p.numel() for p in fitted.fit.pieces[0][2].parameters())
        assert built == fitted.layer.after.params == rows * columns - matrix.saved(rank)
    assert errors == sorted(errors, reverse=True)


@given(rows=SIZES, columns=SIZES, biased=st.booleans(), gauge=st.booleans())
def test_every_rank_makes_the_matrix_smaller(rows, columns, biased, gauge):
    target = MatrixTarget("a", "a", (rows, columns))
    extra = rows if biased else 0
    matrix = MatrixRanks.of(target, CANDIDATES, gauge=gauge, extra=extra)
    assert list(matrix.ranks) == sorted(set(matrix.ranks))
    assert all(matrix.saved(rank) > 0 for rank in matrix.ranks)
    if not gauge:
        assert all(r * (rows + columns) + extra < rows * columns for r in matrix.ranks)


CHOICES = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(
        st.builds(Choice, st.integers(1, 9), st.integers(1, 50), st.floats(-1, 1)), max_size=4
    ),
)


@given(choices=CHOICES, wanted=st.integers(1, 120))
def test_a_choice_meets_the_budget_or_none_can(choices, wanted):
    most = sum(max((c.saved for c in some), default=0) for some in choices.values())
    if most < wanted:
        with pytest.raises(
            BudgetError, match=f"requires saving {wanted} parameters, .* save {most};"
        ):
            choose(choices, wanted)
        return
    chosen = choose(choices, wanted)
    assert sum(choice.saved for choice in chosen.values()) >= wanted
    assert all(choice in choices[name] for name, choice in chosen.items())


def test_the_cheapest_step_goes_first():
    choices = {"a": [Choice(1, 10, 1.0)], "b": [Choice(1, 10, 0.5)], "c": [Choice(1, 1, 0.01)]}
    assert list(choose(choices, 2)) == ["c", "b"]
