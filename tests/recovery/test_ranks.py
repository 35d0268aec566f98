import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.recovery.ranks import effective_rank


@given(rank=st.integers(1, 4), seed=st.integers(0, 20))
def test_bounded_by_the_rank_and_blind_to_scale_and_side(rank, seed, gaussian):
    matrix = gaussian(6, rank, seed=seed) @ gaussian(rank, 5, seed=seed + 1)
    found = effective_rank(matrix)
    assert 1 - 1e-9 <= found <= rank + 1e-6
    assert effective_rank(1e3 * matrix.T) == pytest.approx(found)


def test_of_equal_singular_values_it_is_the_rank():
    assert effective_rank(torch.eye(7)[:, :4]) == pytest.approx(4)
    assert effective_rank(torch.zeros(3, 2)) == 0


@pytest.mark.parametrize("wrong", [torch.ones(3), torch.tensor([[float("inf")]])])
def test_what_has_no_rank_is_refused(wrong):
    with pytest.raises(OptionError, match="expected a finite matrix"):
        effective_rank(wrong)
