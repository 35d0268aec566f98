"""One small layer of every format, found by looking, beside the dense layer that it stands for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import tnlm
from tnlm.decompositions import formats
from tnlm.decompositions.base import Ceiling
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.fused import FusedLinear
from tnlm.layers.linear import FactorizedLinear
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Factors, Network

SHAPE = (24, 16)


class Pair(NamedTuple):
    """A factorized layer and the dense one that computes the same, both in float64."""

    layer: Any
    dense: nn.Module

    def to(self, dtype: torch.dtype) -> Pair:
        """Convert both; another dtype must not have a layer priced anew."""
        crossing = getattr(self.layer, "crossing", None)
        self.layer.to(dtype).crossing = crossing
        self.dense.to(dtype)
        return self


def networks(kind: str) -> dict[str, Network]:
    """Return a network of every format that replaces a kind of module, with and without gauge."""
    found = {}
    for name, structure in formats().items():
        if kind not in structure.kinds:
            continue
        gauged = any(field.name == "gauge" for field in dataclasses.fields(structure.spec))
        for gauge in [True, False] if gauged and kind == "linear" else [False]:
            chosen = {"gauge": gauge} if gauged else {}
            specs = structure.candidates(SHAPE, chosen, Ceiling(0.8 * math.prod(SHAPE)))
            made = structure.network(SHAPE, specs[len(specs) // 2])
            found[name + "-gauge" * gauge] = made
    return found


def _factors(network: Network) -> tuple[Factors, Tensor]:
    """Draw factors; torch's own einsum says which matrix they make."""
    generator = torch.Generator().manual_seed(0)
    factors = {
        name: torch.randn(network.shape_of(name), generator=generator, dtype=torch.float64)
        for name in network.factors
    }
    matrix = torch.einsum(network.equation, *factors.values()).reshape(network.shape)
    return factors, matrix


def _linear(network: Network) -> Pair:
    factors, matrix = _factors(network)
    bias = torch.linspace(-1, 1, network.shape[0], dtype=torch.float64)
    layer = FactorizedLinear(network, bias=True, dtype=torch.float64)
    layer.store(fix(network, factors), bias)
    layer.crossing = math.inf  # the factors are tested, on any machine
    return Pair(layer, _dense(matrix, bias))


def _rebuilt(network: Network) -> Pair:
    pair = _linear(network)
    pair.layer.crossing = 0
    return pair


def _dense(matrix: Tensor, bias: Tensor | None = None) -> nn.Linear:
    rows, columns = matrix.shape
    dense = nn.Linear(columns, rows, bias=bias is not None, dtype=torch.float64)
    dense.load_state_dict({"weight": matrix} | ({} if bias is None else {"bias": bias}))
    return dense


def _fused(network: Network) -> Pair:
    part = _linear(network)
    layer = FusedLinear({"a": part.layer, "b": _dense(torch.eye(SHAPE[1]).double())})
    matrix = torch.cat([part.dense.weight, torch.eye(SHAPE[1])])
    bias = torch.cat([part.dense.bias, torch.zeros(SHAPE[1])])
    return Pair(layer, _dense(matrix, bias))


def _head(network: Network) -> Pair:
    factors, matrix = _factors(network)
    return Pair(FactorizedHead(network, dtype=torch.float64).store(factors), _dense(matrix))


def _embedding(network: Network) -> Pair:
    factors, matrix = _factors(network)
    layer = FactorizedEmbedding(network, dtype=torch.float64).store(factors)
    return Pair(layer, nn.Embedding.from_pretrained(matrix, freeze=False))


def _params(make: Callable[[Network], Pair], found: dict[str, Network], suffix: str = "") -> Any:
    return [pytest.param((make, network), id=name + suffix) for name, network in found.items()]


LINEARS = _params(_linear, networks("linear"))
REBUILT = _params(_rebuilt, networks("linear"), "-rebuilt")
FUSED = _params(_fused, {"low-rank": networks("linear")["low-rank-gauge"]}, "-fused")
HEADS = _params(_head, networks("embedding"), "-head")


def _made(request: pytest.FixtureRequest) -> Pair:
    make, network = request.param
    return make(network)


@pytest.fixture(params=LINEARS)
def linear(request: pytest.FixtureRequest) -> Pair:
    """A linear layer of every format, and its dense one."""
    return _made(request)


@pytest.fixture(params=[*LINEARS, *FUSED, *HEADS])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Whatever maps activations: layers of every format, fused ones and heads."""
    return _made(request)


@pytest.fixture(params=[*LINEARS, *REBUILT, *FUSED, *HEADS])
def either(request: pytest.FixtureRequest) -> Pair:
    """The same, and layers that rebuild their weight."""
    return _made(request)


@pytest.fixture(params=_params(_embedding, networks("embedding")))
def table(request: pytest.FixtureRequest) -> Pair:
    """An embedding of every format that can be one."""
    return _made(request)


@pytest.fixture(scope="session")
def small_model(tiny_llama, tiny_gpt2) -> Callable[[str, str], PreTrainedModel]:
    """Compress a Llama or GPT-2 of one block; every layer runs through its factors."""

    def make(kind: str, scheme: str) -> PreTrainedModel:
        dense = tiny_llama(num_hidden_layers=1) if kind == "llama" else tiny_gpt2(n_layer=1)
        model = tnlm.compress(dense, scheme)
        for module in model.modules():
            if isinstance(module, FactorizedLinear):
                module.crossing = math.inf
        return model

    return make
