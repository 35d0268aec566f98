"""Leading eigenvectors: as good as all of them, to a stated error, at any spectrum."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tnlm.errors import ModelError, OptionError
from tnlm.tensors import eigen
from tnlm.tensors.eigen import LARGE, LOSS, leading_eigenpairs, leading_eigenvectors, leading_left
from tnlm.tensors.linalg import truncated_svd

SPECTRA = {
    "flat": lambda k: torch.ones_like(k),
    "slow": lambda k: k**-0.5,
    "power": lambda k: k**-2.0,
    "steep": lambda k: 0.9**k,
    "spike": lambda k: 1.0 + 1e6 * (k == 1).to(k),
}


def gram(kind, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    values = SPECTRA[kind](torch.arange(1, size + 1, dtype=torch.float64))
    return (basis * values) @ basis.T, values


def left_out(matrix, basis):
    return float(matrix.trace() - (basis.T @ matrix @ basis).trace())


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("rank", [1, 100, LARGE // 2, LARGE])
def test_the_energy_left_out_is_the_least(kind, rank):
    matrix, values = gram(kind, LARGE)
    basis = leading_eigenvectors(matrix, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, eye, rtol=0, atol=1e-12)
    least = float(values[rank:].sum())
    rounding = 1e-12 * float(values.sum())
    assert left_out(matrix, basis) <= (1 + LOSS) * least + rounding


@pytest.mark.parametrize("kind", SPECTRA)
def test_pairs_are_eigenpairs_in_double_precision(kind):
    matrix, values = gram(kind, LARGE, seed=1)
    found, vectors = leading_eigenpairs(matrix, 60)
    scale = float(values[0])
    torch.testing.assert_close(found, values[:60], rtol=0, atol=1e-12 * scale)
    torch.testing.assert_close(matrix @ vectors, vectors * found, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("rank", [1, 100, LARGE // 2, LARGE])
def test_left_vectors_leave_out_the_least_energy(kind, rank):
    basis, _ = gram(kind, LARGE)
    values = SPECTRA[kind](torch.arange(1, LARGE + 1, dtype=torch.float64))
    generator = torch.Generator().manual_seed(2)
    other = torch.randn(LARGE + 40, LARGE, generator=generator, dtype=torch.float64)
    left = torch.linalg.eigh(basis)[1].flip(1)
    matrix = (left * values.sqrt()) @ torch.linalg.qr(other).Q.T
    found, rest = leading_left(matrix, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.T @ found, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(rest, found.T @ matrix)
    least, total = float(values[rank:].sum()), float(values.sum())
    error = float((matrix - found @ rest).square().sum())
    assert error <= (1 + LOSS) * least + 1e-12 * total
    svd = truncated_svd(matrix, rank)
    assert svd.discarded <= (1 + LOSS) * least + 1e-12 * total
    torch.testing.assert_close((svd.u * svd.s) @ svd.vh, found @ rest, rtol=0, atol=1e-6 * total)
    torch.testing.assert_close(svd.u.T @ svd.u, eye, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30])
def test_the_scale_does_not_matter(scale):
    matrix, values = gram("slow", LARGE)
    basis = leading_eigenvectors(matrix * scale, 100)
    assert left_out(matrix, basis) <= (1 + LOSS) * float(values[100:].sum())


def test_single_precision_is_left_where_it_would_cost_too_much(monkeypatch):
    seen = []
    solve = eigen._lapack
    monkeypatch.setattr(eigen, "_lapack", lambda g, r: seen.append(g.dtype) or solve(g, r))
    leading_eigenvectors(gram("flat", LARGE)[0], 100)
    assert seen == [torch.float32]
    leading_eigenvectors(gram("spike", LARGE)[0], 100)
    assert seen == [torch.float32, torch.float32, torch.float64]


@settings(max_examples=15)
@given(size=st.integers(1, 24), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_small_matrices_are_solved_whole(size, share, seed):
    matrix, _ = gram("slow", size, seed)
    rank = max(1, round(share * size))
    values, vectors = torch.linalg.eigh(matrix)
    assert torch.equal(leading_eigenvectors(matrix, rank), vectors.flip(1)[:, :rank])
    assert torch.equal(leading_eigenpairs(matrix, rank)[0], values.flip(0)[:rank])


@pytest.mark.parametrize("find", [leading_eigenpairs, leading_eigenvectors])
def test_what_has_no_answer_is_refused(find):
    matrix = torch.eye(4, dtype=torch.float64)
    for rank in (0, 5):
        with pytest.raises(OptionError, match=f"rank={rank} of a 4x4"):
            find(matrix, rank)
    matrix[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        find(matrix, 2)
