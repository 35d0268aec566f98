"""What a forward pass does, counted, not timed: products, operations, numbers written and kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from tnlm.layers import machine
from tnlm.layers.linear import FactorizedLinear
from tnlm.tensors.network import Gauge, Network

# Operations of torch for one token and for a batch of sequences, views and the bias among them.
# Lower a number when a layer becomes leaner; a higher one is a regression.
MOST_OPERATIONS = {
    "dense": (2, 4),
    "low rank": (5, 9),
    "low rank, gauge out": (7, 12),
    "low rank, gauge in": (8, 14),
}
SIZES = {"o": 24, "r": 4, "i": 16}
LOW_RANK = {
    "low rank": Network({"left": "or", "right": "ri"}, "o", "i", SIZES),
    "low rank, gauge out": Network(
        {"left": "or", "right": "ri"}, "o", "i", SIZES, Gauge("left", "r")
    ),
    "low rank, gauge in": Network(
        {"left": "or", "right": "ri"}, "o", "i", SIZES, Gauge("right", "r")
    ),
}


class Operations(TorchDispatchMode):
    """Records the operations that run, and how many numbers each of them writes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        views = function.is_view or "view" in function.overloadpacket.__name__
        numbers = 0 if views or not torch.is_tensor(result) else result.numel()
        self.written.append((function.overloadpacket.__name__, numbers))
        return result


def operations(module, x):
    with torch.no_grad(), Operations() as seen:
        module(x)
    return seen.written


@pytest.mark.parametrize("name", MOST_OPERATIONS)
def test_operations_do_not_grow_in_number(name, gaussian):
    if name == "dense":
        layer = torch.nn.Linear(16, 24, dtype=torch.float64)
    else:
        layer = FactorizedLinear(LOW_RANK[name], bias=True, dtype=torch.float64)
        layer.crossing = math.inf
    found = [operations(layer, gaussian(*lead, 16)) for lead in [(1,), (2, 7)]]
    for seen, most in zip(found, MOST_OPERATIONS[name], strict=True):
        assert len(seen) <= most, [operation for operation, _ in seen]


@pytest.mark.parametrize("tokens", [1, 7])
def test_products_are_those_that_are_promised(tokens, linear, gaussian):
    with FlopCounterMode(display=False) as counter:
        linear.layer(gaussian(tokens, 16))
    assert counter.get_total_flops() == 2 * tokens * linear.layer.macs


def test_one_token_writes_nothing_of_the_size_of_a_weight(linear, gaussian):
    """Neither the dense weight nor the largest factor is written, copied or put in order."""
    network = linear.layer.network
    largest = max(math.prod(network.shape_of(factor)) for factor in network.factors)
    written = operations(linear.layer, gaussian(1, 16))
    # What a token carries round a ring is as large as a core here, though it is none.
    carried = max(math.prod(step.after) for step in linear.layer.chain.steps)
    assert max(numbers for _, numbers in written) <= max(largest - 1, carried), written
    assert largest <= linear.dense.weight.numel() > carried


def test_a_forward_pass_writes_in_proportion_to_its_tokens(linear, gaussian):
    numbers = [
        sum(numbers for _, numbers in operations(linear.layer, gaussian(tokens, 16)))
        for tokens in (100, 200, 300)
    ]
    assert numbers[2] - numbers[1] == numbers[1] - numbers[0]
    assert 2 * numbers[0] - numbers[1] <= linear.dense.weight.numel()  # what no token asks for


def test_training_keeps_no_more_than_the_input_and_the_output(linear, gaussian):
    """As a dense layer does, whose output the next layer keeps; factors are kept anyway."""
    network, tokens, kept = linear.layer.network, 1000, {}
    bond = network.sizes[network.gauge.bond] if network.gauge else 0
    own = {p.untyped_storage().data_ptr() for p in linear.layer.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes() // 8
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        linear.layer(gaussian(tokens, 16).requires_grad_())
    # A gauge at the input keeps it in both orders, and what has passed through the bond.
    most = 16 + max(24, 16 + bond if bond else 0)
    assert sum(kept.values()) <= tokens * most + linear.dense.weight.numel()


@pytest.mark.parametrize(
    "surrounding",
    [FlopCounterMode(display=False), FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16)],
    ids=["counter", "fake tensors", "autocast"],
)
def test_a_machine_is_measured_outside_of_what_surrounds_the_first_call(
    surrounding, monkeypatch, tmp_path
):
    """Else a counter sees the measurements, and the file keeps what fake tensors took."""
    inside = []

    def see(task, *args, **kwargs):
        inside.append(_get_current_dispatch_mode() or torch.is_autocast_enabled("cpu") or None)
        return 1e-6

    monkeypatch.setenv(machine.HOME, str(tmp_path))
    monkeypatch.setattr(machine, "_seconds", see)
    machine._known_or_measured.cache_clear()
    try:
        with surrounding:
            machine.machine(torch.float32)
    finally:
        machine._known_or_measured.cache_clear()
    assert inside
    assert not any(inside)
