import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import OptionError
from tnlm.metrics.metric import Metric
from tnlm.metrics.sides import Side
from tnlm.recovery.pruning.column_weights import FLOOR, column_weights


@given(seed=st.integers(0, 50), share=st.floats(0.1, 1.0), scale=st.sampled_from([1e-12, 1.0, 1e8]))
def test_columns_count_their_kept_positive_scores(seed, share, scale, gaussian):
    scores = gaussian(6, 4, seed=seed) * scale
    mask = gaussian(6, 4, seed=seed + 99) < share
    found = column_weights(scores, mask)
    sums = torch.tensor(
        [
            sum(float(scores[i, j]) for i in range(6) if mask[i, j] and scores[i, j] > 0)
            for j in range(4)
        ],
        dtype=torch.float64,
    )
    if float(sums.sum()) == 0:
        assert torch.equal(found, torch.ones(4).double())
        return
    torch.testing.assert_close(found, (sums / sums.mean()).clamp_min(FLOOR))
    assert bool((found > 0).all())
    torch.testing.assert_close(column_weights(3 * scores, mask), found)  # of any scale


def test_signed_scores_are_clamped_not_their_size():
    scores = torch.tensor([[2.0, -5.0, -4.0], [2.0, 4.0, -4.0]])
    every = torch.ones(2, 3, dtype=torch.bool)
    assert column_weights(scores, every).tolist() == [1.5, 1.5, FLOOR]
    kept = column_weights(scores, torch.tensor([[True, True, False], [False, True, False]]))
    assert kept.tolist() == [1.0, 2.0, FLOOR]  # the masked 2 counts no more than a negative
    assert column_weights(-scores.abs(), every).tolist() == [1.0, 1.0, 1.0]


@given(seed=st.integers(0, 20))
def test_the_weighted_fit_is_the_closed_form(seed, gaussian):
    weight, scores = gaussian(7, 5, seed=seed), gaussian(7, 5, seed=seed + 1)
    columns = column_weights(scores, scores > 0)
    structure = get_format("low-rank")
    spec = from_dict(structure.spec, {"rank": 2})
    metric = Metric(inputs=Side(columns))
    factors = structure.fit(weight, metric, spec)
    error = metric.norm(weight - structure.reconstruct((7, 5), spec, factors))
    tail = torch.linalg.svdvals(weight * columns.sqrt())[2:].norm()
    assert float(error) == pytest.approx(float(tail), rel=1e-6)


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2).bool(), r"scores \(2, 3\) and a mask \(3, 2\) differ"),
        (torch.tensor([[float("nan")]]), torch.ones(1, 1).bool(), "scores must be finite"),
    ],
)
def test_scores_of_no_use_are_refused(scores, mask, message):
    with pytest.raises(OptionError, match=message):
        column_weights(scores, mask)
