import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.studies.analysis import projections
from tnlm.studies.analysis.fastfood import Fastfood, hadamard
from tnlm.studies.analysis.projections import Dense

KINDS = [Dense, Fastfood]
SIZES = st.integers(1, 40)


def matrix_of(projection):
    eye = torch.eye(projection.dims, dtype=torch.float64)
    return torch.stack([projection.apply(column) for column in eye], dim=1)


def test_hadamard_is_the_textbook_matrix():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    eight = torch.kron(two, torch.kron(two, two))
    assert torch.equal(hadamard(torch.eye(8, dtype=torch.float64)), eight)


@given(power=st.integers(0, 9), seed=st.integers(0, 99))
def test_hadamard_twice_multiplies_by_the_size(power, seed, gaussian):
    x = gaussian(3, 2**power, seed=seed)
    torch.testing.assert_close(hadamard(hadamard(x)), 2**power * x)


@pytest.mark.parametrize("size", [0, 3, 12])
def test_hadamard_takes_powers_of_two(size):
    with pytest.raises(OptionError, match=f"size {size}; allowed: powers of 2"):
        hadamard(torch.zeros(2, size))


def test_hadamard_gradient_is_exact(gaussian):
    assert torch.autograd.gradcheck(hadamard, gaussian(2, 8).requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIZES, dims=SIZES, seed=st.integers(0, 99))
def test_gradient_is_exact(kind, size, dims, seed, gaussian):
    x = gaussian(dims, seed=seed).requires_grad_()
    assert torch.autograd.gradcheck(kind(size, dims, seed), x)


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIZES, dims=SIZES, seed=st.integers(0, 99))
def test_transpose_is_the_adjoint(kind, size, dims, seed, gaussian):
    projection = kind(size, dims, seed)
    x, y = gaussian(dims), gaussian(size, seed=1)
    assert float(projection.apply(x) @ y) == pytest.approx(float(x @ projection.transpose(y)))


@pytest.mark.parametrize("kind", KINDS)
@given(size=st.integers(200, 700), dims=st.integers(2, 30), seed=st.integers(0, 99))
def test_columns_are_nearly_orthonormal(kind, size, dims, seed):
    matrix = matrix_of(kind(size, dims, seed))
    error = matrix.T @ matrix - torch.eye(dims, dtype=torch.float64)
    # Products of two columns have a standard deviation of at most √(3 / size).
    assert float(error.abs().max()) < 6 * (3 / size) ** 0.5


@given(power=st.integers(1, 7), dims=st.integers(1, 2), seed=st.integers(0, 99))
def test_columns_of_a_whole_fastfood_have_length_one(power, dims, seed):
    lengths = matrix_of(Fastfood(2**power, dims, seed)).norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


@given(size=SIZES, dims=SIZES, seed=st.integers(0, 99))
def test_fastfood_is_the_textbook_product(size, dims, seed):
    projection = Fastfood(size, dims, seed)
    signs, order, normal, scale = projection._parts(torch.device("cpu"))
    whole = hadamard(torch.eye(len(order), dtype=torch.float64))
    right = whole[order.long(), :dims] * signs
    expected = scale * (whole * normal.double())[:size] @ right
    torch.testing.assert_close(matrix_of(projection), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_that_goes_in_counts_where_the_tensor_is_small(kind):
    # Padding to the tensor's size alone would silently cut off all but the first few.
    assert bool((matrix_of(kind(3, 50, seed=0)).norm(dim=0) > 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_the_whole_matrix(kind, gaussian):
    x, y = gaussian(20), gaussian(300, seed=1)
    one, two, other = (kind(300, 20, seed) for seed in (7, 7, 8))
    state = torch.get_rng_state()
    assert torch.equal(one.apply(x), two.apply(x))
    assert torch.equal(one.apply(x), one.apply(x))
    assert torch.equal(one.transpose(y), two.transpose(y))
    assert not torch.allclose(one.apply(x), other.apply(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dense_matrix_is_never_whole(monkeypatch, gaussian):
    whole = Dense(64, 8, 0)
    expected = matrix_of(whole)
    drawn = []
    original = torch.randn
    monkeypatch.setattr(projections, "BLOCK", 8 * 16)
    monkeypatch.setattr(
        torch, "randn", lambda *size, **kw: drawn.append(size) or original(*size, **kw)
    )
    in_blocks = matrix_of(Dense(64, 8, 0))
    assert set(drawn) == {(16, 8)}
    assert in_blocks.shape == expected.shape


@pytest.mark.parametrize("kind", KINDS)
def test_no_matrix_is_kept(kind):
    held = [v for v in vars(kind(1000, 10, 0)).values() if isinstance(v, torch.Tensor)]
    assert sum(tensor.numel() for tensor in held) <= 10
