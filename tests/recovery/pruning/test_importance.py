from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tnlm.errors import TrainingError
from tnlm.layers.adapters import Adapter, matrix
from tnlm.recovery.pruning.groups import find_groups
from tnlm.recovery.pruning.importance import _gradient, importances

IDS = torch.arange(64).reshape(2, 32) % 61 + 3


def adapter_of(gaussian, rows=5, columns=7, rank=3, scale=2.0, seed=0):
    weight, up, down, db, da = (
        gaussian(*shape, seed=seed + i)
        for i, shape in enumerate(
            [(rows, columns), (rows, rank), (rank, columns), (rows, rank), (rank, columns)]
        )
    )
    base = nn.Linear(columns, rows, bias=False)
    base.weight = nn.Parameter(weight, requires_grad=False)
    made = Adapter(base, nn.Parameter(down), nn.Parameter(up), scale)
    made.A.grad, made.B.grad = da, db
    return made


@given(seed=st.integers(0, 99))
def test_gradient_is_what_a_step_takes_away(gaussian, seed):
    adapter = adapter_of(gaussian, seed=seed)
    a, b = adapter.A.detach(), adapter.B.detach()
    taken = b @ a - (b - adapter.B.grad) @ (a - adapter.A.grad)
    torch.testing.assert_close(_gradient(adapter), adapter.scaling * taken)


def test_gradient_of_small_steps_is_the_chain_rule(gaussian):
    """With small ∂A and ∂B of a loss with gradient G at W: s² (G AᵀA + B Bᵀ G)."""
    adapter, target = adapter_of(gaussian), 1e-6 * gaussian(5, 7, seed=9)
    adapter.A.grad = adapter.B.grad = None
    merged = adapter.base.weight + adapter.scaling * adapter.B @ adapter.A
    (merged * target).sum().backward()  # G is the target
    a, b = adapter.A.detach(), adapter.B.detach()
    wanted = adapter.scaling**2 * (target @ a.T @ a + b @ b.T @ target)
    torch.testing.assert_close(_gradient(adapter), wanted, rtol=1e-4, atol=1e-9)


def true_gradients(model, names):
    model(IDS, labels=IDS).loss.backward()
    return {name: model.get_submodule(name).weight.grad for name in names}


def expected(groups, model, gradients, power):
    """Full-gradient Taylor importances, written out group by group."""
    total = torch.zeros(groups.count, dtype=torch.float64)
    for cut in groups.cuts:
        weight = matrix(model.get_submodule(cut.module))
        gradient = gradients[cut.module]
        gradient = gradient if gradient.shape == weight.shape else gradient.T
        slabs = (weight * gradient).double().abs().pow(power).split(cut.slabs.size, dim=cut.axis)
        sums = torch.stack([slab.sum() for slab in slabs])
        total += sums / sums.norm()
    return total


@pytest.mark.parametrize(("measure", "power"), [("taylor", 1), ("squared", 2)])
@pytest.mark.parametrize(
    ("kind", "of"), [("llama", "heads"), ("llama", "channels"), ("gpt2", "channels")]
)
def test_orthogonal_adapters_at_their_start_give_the_true_importances(
    kind, of, measure, power, make_model, gaussian
):
    model = make_model(kind).double()
    names = [n for n, m in model.named_modules() if hasattr(m, "weight") and m.weight.dim() == 2]
    groups = find_groups(model, names, of)[1]
    cuts = [cut.module for cut in groups.cuts]
    gradients, adapters = true_gradients(model, cuts), {}
    for i, name in enumerate(cuts):
        base, gradient = model.get_submodule(name), gradients[name]
        rows, columns = matrix(base).shape
        gradient = gradient if gradient.shape == (rows, columns) else gradient.T
        a = torch.linalg.qr(gaussian(columns, columns, seed=i)).Q
        up = nn.Parameter(torch.zeros(rows, columns, dtype=torch.float64))
        adapter = adapters[name] = Adapter(base, nn.Parameter(a), up, 0.5)
        adapter.B.grad = adapter.scaling * gradient @ a.T
        adapter.A.grad = torch.zeros_like(a)  # s Bᵀ G
        torch.testing.assert_close(_gradient(adapter), adapter.scaling**2 * gradient)
    torch.testing.assert_close(
        importances(groups, adapters, measure), expected(groups, model, gradients, power)
    )


def test_gradients_that_are_missing_or_not_finite(tiny_llama, gaussian):
    model = tiny_llama()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    groups = find_groups(model, names, "channels")[0]
    adapters = {}
    for cut in groups.cuts:
        rows, columns = matrix(model.get_submodule(cut.module)).shape
        adapters[cut.module] = adapter_of(gaussian, rows, columns)
    reader = adapters[groups.consumer.module]
    reader.B.grad[0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"down_proj: the gradients .* not finite"):
        importances(groups, adapters)
    reader.B.grad = None
    with pytest.raises(TrainingError, match="no gradient"):
        importances(groups, adapters)


def test_matrices_without_gradients_add_nothing(tiny_llama, gaussian):
    model = tiny_llama()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    groups = find_groups(model, names, "channels")[0]
    adapters = {}
    for cut in groups.cuts:
        rows, columns = matrix(model.get_submodule(cut.module)).shape
        adapters[cut.module] = made = adapter_of(gaussian, rows, columns)
        made.B.grad.zero_()
        made.A.grad.zero_()
    assert torch.equal(importances(groups, adapters), torch.zeros(48, dtype=torch.float64))


def test_merged_is_what_the_adapter_computes(gaussian):
    adapter, x = adapter_of(gaussian), gaussian(4, 7, seed=5)
    a, b = adapter.A.detach(), adapter.B.detach()
    wanted = adapter.base(x) + adapter.scaling * x @ a.T @ b.T
    torch.testing.assert_close(x @ adapter.merged().T, wanted)
