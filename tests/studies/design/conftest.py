from __future__ import annotations

import pytest
import torch

from tnlm.studies.design.space import DesignSpace


@pytest.fixture
def model(tiny_llama):
    return tiny_llama(num_hidden_layers=4)


@pytest.fixture
def space(model):
    return DesignSpace(model)


@pytest.fixture(scope="session")
def loss():
    """Return the loss of a model on ids of its own vocabulary."""
    ids = torch.arange(40).reshape(2, 20) % 61 + 3

    def measure(model):
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    return measure


@pytest.fixture(scope="session")
def state():
    """Return everything of a model that a trial might change."""

    def of(model):
        return (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            [(name, id(module), module.training) for name, module in model.named_modules()],
            [(name, id(p), p.requires_grad, p._version) for name, p in model.named_parameters()],
        )

    return of


@pytest.fixture(scope="session")
def same():
    """Tell whether two states are the same, bit for bit."""

    def compare(one, other):
        assert one[1:] == other[1:]
        assert one[0].keys() == other[0].keys()
        assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])

    return compare
