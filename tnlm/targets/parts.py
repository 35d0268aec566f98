"""Finds modules that hold several matrices of one input, and the layout of their rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from tnlm.layers.fused import Layout
from tnlm.targets.feed_forward import feed_forward_layers
from tnlm.targets.stubs import Linear, widths

QKV = ("q", "k", "v")
CONCATENATED = ("qkv_proj", "Wqkv", "qkv", "qkv_linear")
"""Names of modules that concatenate queries, keys and values."""
BY_HEAD = ("query_key_value", "c_attn")
"""Names of modules that interleave them by head; a Conv1D ``c_attn`` is concatenated."""
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
"""Names of the number of query heads in modules and configs."""
CODEGEN = ("q", "v", "k")
CHIPS = 4
"""CodeGen's ``qkv_proj`` repeats its own order for each chip that it was trained on."""


def fused_layouts(model: nn.Module) -> dict[str, Layout]:
    """Return the layouts of fused modules, by name.

    Queries, keys and values are recognised by the module's name and the number of heads; gates and
    values by a trial, see `tnlm.targets.feed_forward`.

    Example:
        >>> from transformers import Phi3Config, Phi3Model
        >>> model = Phi3Model(Phi3Config(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2, pad_token_id=0))
        >>> for name, layout in fused_layouts(model).items():
        ...     print(name, layout.parts, layout.sizes)
        layers.0.self_attn.qkv_proj ('q', 'k', 'v') (8, 4, 4)
        layers.0.mlp.gate_up_proj ('gate', 'up') (12, 12)
    """
    return {**dict(_projections(model)), **dict(_gates(model))}


def _projections(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if isinstance(module, Linear) and last in (*CONCATENATED, *BY_HEAD):
            if isinstance(module, Conv1D):
                layout = _equal(*widths(module))
            else:
                layout = _by_heads(model, model.get_submodule(parent), last, *widths(module))
            if layout is not None:
                yield name, layout


def _equal(rows: int, columns: int) -> Layout | None:
    """Return the layout of GPT-2's ``c_attn``, which has no queries in cross-attention."""
    names = {3: QKV, 2: QKV[1:]}.get(rows // columns)
    if names is None or rows % columns:
        return None
    return Layout(names, (columns,) * len(names))


def _by_heads(
    model: nn.Module, attention: nn.Module, name: str, rows: int, columns: int
) -> Layout | None:
    """Return the layout of a module whose rows match its heads, or None."""
    config: Any = getattr(attention, "config", None) or getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = _first((attention, *HEADS), (text, *HEADS))
    width = _first((attention, "head_dim"), (text, "head_dim")) or (count and columns // count)
    if not count or not width or rows % width:
        return None
    shared, odd = divmod(rows // width - count, 2)  # rows = (heads + 2 shared) width
    if odd or shared < 1 or count % shared:
        return None
    sizes = (count * width, shared * width, shared * width)
    kind = getattr(config, "model_type", "")
    if kind == "codegen":
        return None if sizes[0] % CHIPS else Layout(CODEGEN, sizes, CHIPS)
    by_head = name in BY_HEAD or kind == "minimax"
    return Layout(QKV, sizes, shared if by_head else 1)


def _first(*places: tuple[Any, ...]) -> int | None:
    """Return the first attribute among some names that is an integer."""
    for owner, *names in places:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and value > 0:
                return value
    return None


def _gates(model: nn.Module) -> Iterator[tuple[str, Layout]]:
    if not _may_be_gated(model):
        return
    for layer in feed_forward_layers(model):
        if layer.reason is None:
            for name, first in layer.gates:
                slabs, count = layer.hidden.producers[name], layer.hidden.count
                names = ("gate", "up") if first else ("up", "gate")
                groups = count if slabs.size == 2 else 1
                whole = f"{layer.parent}.{name}".lstrip(".")
                yield whole, Layout(names, (count, count), groups)


def _may_be_gated(model: nn.Module) -> bool:
    """Return whether a matrix has twice as many outputs as one near it has inputs."""
    sizes = {name: widths(module) for name, module in model.named_modules() if _is_matrix(module)}
    outputs: dict[str, set[int]] = {}
    for name, (rows, _) in sizes.items():
        for around in _enclosing(name):
            outputs.setdefault(around, set()).add(rows)
    return any(
        2 * columns in outputs[around]
        for name, (_, columns) in sizes.items()
        for around in _enclosing(name)[:2]
        if around or not isinstance(model, PreTrainedModel)
    )


def _enclosing(name: str) -> list[str]:
    """Return the names of the modules around a module, from the inside out."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1)]


def _is_matrix(module: Any) -> bool:
    return isinstance(module, Linear) and getattr(module.weight, "ndim", 0) == 2
