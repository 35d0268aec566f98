"""The cost of dropping experts is that of the block's changed outputs, for nested sets."""

from __future__ import annotations

import pytest
import torch

from tests.targets.test_routing import mixture
from tnlm.calibration.data import token_batches
from tnlm.calibration.removal import _order, collect_removal
from tnlm.targets.routing import fewer, find_mixture
from tnlm.targets.stubs import copied

BLOCK = "model.layers.0.mlp"
IDS = torch.arange(600).remainder(31).roll(3)


@pytest.fixture(scope="module")
def measured(gaussian):
    """A model, its first mixture, the moment of gradients, and what was gathered."""
    model = mixture("mixtral")
    found = find_mixture(model, f"{BLOCK}.experts", 8)
    batches = token_batches(IDS, None, num_samples=4, max_length=20, seed=0)
    root = gaussian(16, model.config.hidden_size)
    moment = root.T @ root
    store = collect_removal(model, [found], batches, lambda _: moment, progress=False)
    return model, found, moment, store.tensor(f"{BLOCK}.experts", "removal"), batches


def states_of(model, batches):
    seen = []
    handle = model.get_submodule(BLOCK).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch["input_ids"])
    handle.remove()
    return torch.cat(seen)


def cost(model, moment, x, kept):
    """Return the cost of a set by running the block with fewer experts."""
    block = model.get_submodule(BLOCK)
    small = {part: fewer(part, 8, kept) for part in (block.gate, block.experts)}
    with torch.no_grad():
        change = (copied(block, small)(x) - copied(block, {})(x)).flatten(0, 1).double()
    return float(((change @ moment) * change).sum(1).mean())


def test_the_first_to_go_costs_least(measured):
    model, _, moment, removal, batches = measured
    x, every = states_of(model, batches), torch.arange(8)
    costs = [cost(model, moment, x, every[every != gone]) for gone in range(8)]
    assert removal.argmin() == torch.tensor(costs).argmin()
    assert float(removal.min()) == pytest.approx(min(costs), rel=1e-4)


def test_sums_are_the_costs_of_nested_sets_or_more(measured):
    model, _, moment, removal, batches = measured
    x, order = states_of(model, batches), removal.argsort()
    sums = removal.sort().values.cumsum(0)
    costs = [cost(model, moment, x, order[n:].sort().values) for n in range(1, 7)]
    pairs = zip(sums[:6].tolist(), costs, strict=True)
    assert all(total >= least * (1 - 1e-4) for total, least in pairs)


def test_what_no_token_meets_costs_nothing(measured):
    model, found, moment, _, batches = measured
    gate = model.get_submodule(BLOCK).gate
    before = gate.weight.detach().clone()
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[:, 0] = torch.arange(8.0)  # tokens meet 6 and 7, or 0 and 1
        store = collect_removal(model, [found], batches, lambda _: moment, progress=False)
        gate.weight.copy_(before)
    removal = store.tensor(f"{BLOCK}.experts", "removal")
    assert sorted(removal.argsort()[:4].tolist()) == [2, 3, 4, 5]
    assert float(removal.sort().values[:4].sum()) < 1e-9 < float(removal.sort().values[4])


def test_the_order_counts_what_two_share():
    pairs = torch.tensor([[1.0, 5.0, 0.0], [5.0, 2.0, 0.0], [0.0, 0.0, 4.0]])
    assert _order(pairs).tolist() == [0, 2, 1]
    assert _order(pairs.diagonal().diag()).tolist() == [0, 1, 2]
