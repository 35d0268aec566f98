"""Predicts how fast the layers of a compressed model are on this machine, compared with dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tnlm.errors import ModelError, OptionError
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.machine import Machine, machine
from tnlm.layers.made import Made, made_layers
from tnlm.layers.pricing import crossing, rebuilding, through
from tnlm.layers.submatrix import SubmatrixLinear


def predict_speed(model: nn.Module, tokens: Sequence[int] = (1, 16, 512)) -> dict[int, float]:
    """Predict the speed-up over dense of the layers that tnlm replaced.

    A factorized layer replaces one large product by several smaller ones, which may be slower for
    small matrices; a result below 1 means slower than dense. The prediction uses times for
    products, memory reads and reordering that are measured once per machine. It leaves out
    attention, norms, embeddings and heads. If layers are slow at many tokens,
    :func:`tnlm.keep_rebuilt` gives dense speed at the cost of memory.

    Args:
        model: a compressed model, on a CPU or a CUDA device.
        tokens: token counts of one forward pass: sequences times their length.

    Returns:
        For each token count, the dense layers' time divided by the replaced layers'.

    Raises:
        ModelError: if the model is not compressed by tnlm, or no linear layer was replaced.
        OptionError: if a token count is below 1.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = tnlm.compress(LlamaForCausalLM(tiny), "svd", progress=False)
        >>> sorted(predict_speed(model))
        [1, 16, 512]
    """
    if not tokens or min(tokens) < 1:
        raise OptionError(f"tokens={list(tokens)}; allowed: counts of at least 1")
    layers = [made for made in made_layers(model) if made.linear]
    if not layers:
        raise ModelError("tnlm replaced no linear layer of this model; compress or load one first")
    packed = [made.name for made in layers if "precision" in made.entry]
    if packed:
        raise ModelError(
            f"{packed[0]} is stored in few bits, whose time is not predicted; measure it with "
            "tnlm.efficiency"
        )
    parameter = next(layers[0].module.parameters())
    prices = machine(parameter.dtype, parameter.device.type)
    size = parameter.element_size()
    found = {}
    for count in tokens:
        dense = [
            prices.product(count, *_dense_shape(made), 1, size, arranged=False) for made in layers
        ]
        found[count] = sum(dense) / sum(_seconds(m.module, prices, size, count) for m in layers)
    return found


def _dense_shape(made: Made) -> tuple[int, int]:
    rows, columns = made.entry.get("full", made.entry["shape"])
    return rows, columns


def _seconds(layer: Any, prices: Machine, size: int, tokens: int) -> float:
    """Return the time of a layer, along the path that it would choose."""
    if isinstance(layer, SubmatrixLinear):
        return _kept(layer, prices, size, tokens)
    if not isinstance(layer, FactorizedLinear):
        return prices.product(tokens, layer.out_features, layer.in_features, 1, size)
    network, plan, kept = layer.network, layer.chain, layer.rebuilt is not None
    start = layer.crossing
    if start is None:
        start = crossing(network, plan, prices, size, kept=kept)
    if tokens < start:
        return through(network, plan, prices, size, tokens)
    first = 0.0 if kept else rebuilding(network, prices, size)
    return first + prices.product(tokens, *network.shape, 1, size)


def _kept(layer: SubmatrixLinear, prices: Machine, size: int, tokens: int) -> float:
    """Return the time to gather the inputs that are kept, multiply, and put the outputs back."""
    seconds = prices.product(tokens, layer.rows, layer.columns, 1, size)
    if layer.columns < layer.in_features:
        seconds += prices.reorder(tokens * layer.columns, size)
    if layer.rows < layer.out_features:
        seconds += prices.step + prices.reorder(tokens * layer.out_features, size)
    return seconds
