from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tnlm.tensors.procrustes import Procrustes, cayley


def drawn(seed, size):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(size, size, generator=generator, dtype=torch.float64)


def weighted(seed, size=6, terms=3):
    """A problem from random matrices, and the squared error that it is a part of."""
    draw = drawn(seed, size)
    cases = []
    for _ in range(terms):
        outer, inner = draw(), draw()
        cases.append((outer @ outer.T, inner @ inner.T, draw(), draw()))
    pairs = [(g, k @ c @ k.T) for g, c, w, k in cases]
    pull = sum(g @ w @ c @ k.T for g, c, w, k in cases)

    def error(rotation):
        rests = [(g, c, w - rotation @ k) for g, c, w, k in cases]
        return float(sum(torch.trace(g @ rest @ c @ rest.T) for g, c, rest in rests))

    return Procrustes(pairs, pull), error


@given(st.integers(0, 1000))
def test_the_value_is_the_error_but_for_what_no_rotation_changes(seed):
    problem, error = weighted(seed)
    skew = drawn(seed + 1, 6)()
    one, other = torch.eye(6, dtype=torch.float64), cayley(skew - skew.T)
    change = problem.value(other) - problem.value(one)
    assert abs(change - (error(other) - error(one))) <= 1e-9 * (error(one) + error(other))


@given(st.integers(0, 1000))
def test_the_solution_is_orthogonal_and_no_worse_than_the_start(seed):
    problem, error = weighted(seed)
    found, eye = problem.solve(), torch.eye(6, dtype=torch.float64)
    assert float((found.T @ found - eye).abs().max()) <= 1e-12
    assert error(found) <= error(eye)


def test_more_steps_are_never_worse():
    problem, _ = weighted(3)
    values = [problem.value(problem.solve(steps, spent=0.0)) for steps in range(6)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


@given(st.integers(0, 100))
def test_without_weights_it_ends_at_the_polar_factor(seed):
    draw, eye = drawn(seed, 5), torch.eye(5, dtype=torch.float64)
    skew = draw()
    near = cayley(0.2 * (skew - skew.T))
    fit = torch.linalg.qr(draw())[0] * torch.linspace(1.0, 1.5, 5)
    problem = Procrustes([(eye, fit @ fit.T)], near @ fit @ fit.T)  # W = Q K exactly
    found = problem.solve(50, spent=0.0)
    assert problem.value(found) - problem.value(near) <= 1e-6 * abs(problem.value(near))


def test_where_nothing_can_be_gained_the_identity_stays():
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.equal(Procrustes([(eye, eye)], eye).solve(), eye)
    assert torch.equal(Procrustes([], torch.zeros(4, 4, dtype=torch.float64)).solve(), eye)
