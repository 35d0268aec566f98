"""One decision for the same matrix of all experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.mixtures import KINDS, make
from tnlm.decompositions import get_format
from tnlm.decompositions.alike import Alike as AlikeFormat
from tnlm.decompositions.base import to_dict
from tnlm.layers.unfolded import unfold
from tnlm.metrics.metric import Metric
from tnlm.metrics.several import Several
from tnlm.plans.plan import LayerPlan
from tnlm.targets import joint_targets
from tnlm.targets.alike import alike, together
from tnlm.targets.selection import select
from tnlm.tensors.contraction import chain


def units_of(kind="Mixtral"):
    model = make(kind)
    unfold(model)
    targets = select(model, ["experts"]).targets
    return model, targets, alike(model, targets)


@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_of_a_matrix_are_one_unit(kind):
    model, targets, units = units_of(kind)
    assert sum(len(unit.members) for unit in units) == len(targets)
    for unit in units:
        assert len(unit.alike) == 4
        assert unit.params == sum(one.params for one in unit.alike)
        stack = unit.weight(model)
        assert all(torch.equal(stack[n], one.weight(model)) for n, one in enumerate(unit.alike))
        assert stack.untyped_storage().data_ptr() == (
            unit.alike[0].weight(model).untyped_storage().data_ptr()
        )


def test_costs_count_the_experts_that_a_token_meets():
    _, _, (unit, *_) = units_of()
    network = get_format("low-rank").network(unit.shape, get_format("low-rank").spec(8))
    one = unit.alike[0].cost(network, 4)
    found = unit.cost(network, 4)
    assert (found.params, found.bytes) == (4 * one.params, 4 * one.bytes)
    assert found.macs == 2 * 8 * (48 + 32 - 8)  # 2 of 4
    assert unit.dense_cost(4).macs == 2 * 48 * 32


def test_feed_forward_layers_narrow_together():
    model, targets, units = units_of()
    joint = alike(model, joint_targets(model, targets))
    channels = [unit for unit in joint if unit.kind == "channels"]
    assert [len(unit.alike) for unit in channels] == [4, 4]
    assert {m.name for unit in channels for m in unit.members} == {t.name for t in targets}
    assert channels[0].name == "+".join(unit.name for unit in units[:3])


def test_names_without_the_expert():
    places = ["a.experts"]
    assert together(places, "a.experts.12.up_proj") == "a.experts.up_proj"
    assert together(places, "a.experts.norm.weight") == "a.experts.norm.weight"
    assert together(places, "b.experts.1.up_proj") == "b.experts.1.up_proj"


def test_errors_add_up_over_experts():
    inner = get_format("low-rank")
    stack = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(0))
    scales = [1.0, 0.0, 2.5]
    several = Several([Metric] * 3, scales)
    specs = [inner.spec(rank) for rank in (1, 3, 5)]
    found = AlikeFormat(inner).errors(stack, several, specs)
    norms = [s * float(m.double().norm()) ** 2 for s, m in zip(scales, stack, strict=True)]
    for index, spec in enumerate(specs):
        each = [inner.errors(matrix, Metric(), [spec])[0] ** 2 for matrix in stack]
        expected = sum(n * e for n, e in zip(norms, each, strict=True)) / sum(norms)
        assert found[index] == pytest.approx(expected**0.5, abs=1e-7)
    curve = AlikeFormat(inner).curve(stack, several, {}, float("inf"))
    assert [spec.rank for spec, _ in curve] == [1, 2, 3, 4, 5]
    assert [error for _, error in curve] == sorted((e for _, e in curve), reverse=True)
    (within, *_) = AlikeFormat(inner).within(stack, several, {}, 0.5)
    assert AlikeFormat(inner).errors(stack, several, [within])[0] <= 0.5


def test_a_stack_of_matrices_apart_is_copied():
    from tnlm.targets.alike import _as_one

    matrices = [nn.Linear(3, 2).weight.detach() for _ in range(3)]
    assert torch.equal(_as_one(matrices), torch.stack(matrices))


@pytest.mark.parametrize("ranks", [(4, 20, 12), (3, 20, 12), (4, 48, 12)])
@pytest.mark.parametrize("gauge", [True, False])
def test_costs_of_a_shared_network_count_it_once(ranks, gauge):
    _, _, (unit, *_) = units_of()
    structure = unit.taken(get_format("expert-tucker"))
    spec = structure.spec(ranks, 4, 4, gauge)
    network = structure.network(unit.shape, spec)
    one = get_format("expert-tucker").network(unit.shape, structure.spec(ranks, 1, 4, gauge))
    found = unit.cost(network, 4)
    assert found.params == network.params
    assert found.bytes == 4 * network.params + one.index_bytes
    assert found.macs == 2 * chain(one).macs  # 2 of 4 experts
    assert unit.fixed == {"slices": 4, "stack": 4}


def test_slices_of_a_tensor_share_what_numbers_no_expert():
    model, _, (unit, *_) = units_of()
    structure = unit.taken(get_format("expert-tucker"))
    spec = structure.spec((4, 20, 12), 4, 4)
    cost = unit.cost(structure.network(unit.shape, spec), 4)
    layer = LayerPlan(
        unit.name, unit.kind, unit.shape, "expert-tucker", to_dict(spec), unit.dense_cost(4), cost
    )
    several = Several([Metric] * 4, [1.0] * 4)
    fitted = unit.fit(model, layer, several)
    matrices = torch.stack([module.to_dense() for _, _, module in fitted.pieces])
    assert several.relative(unit.weight(model), matrices) == pytest.approx(fitted.error, rel=1e-5)
    place = "model.layers.0.mlp.experts"
    assert fitted.ties == {
        f"{place}.{e}.gate_proj.{name}.weight": f"{place}.0.gate_proj.{name}.weight"
        for e in (1, 2, 3)
        for name in ("mode1", "mode2")
    }


def test_metrics_that_take_too_much_memory_leave_each_expert_by_itself(monkeypatch):
    _, _, (unit, *_) = units_of()
    assert unit.kinds == {"linear", "expert-stack"}
    monkeypatch.setattr("tnlm.targets.alike.LARGEST", 4 * 8 * (48**2 + 32**2) - 1)
    assert unit.kinds == {"linear"}
