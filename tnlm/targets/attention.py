"""Finds attention whose key/value heads are independent, so that some can be removed."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.targets.feed_forward import Layer
from tnlm.targets.signature import signature
from tnlm.targets.stubs import Call, random_values, widths
from tnlm.targets.trial import TOKENS, Hidden, Slabs, objection
from tnlm.utils.residency import resident

ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), "o_proj"),  # Llama, Mistral, Qwen, Gemma, SmolLM
    (("q_proj", "k_proj", "v_proj"), "dense"),  # Phi
)
"""Names of the matrices that make heads, and of the one that reads them."""
ROTATION = "rotary_emb"
"""What models call the module that makes position embeddings."""


def heads_of(module: nn.Module, names: Sequence[str], width: int) -> Hidden | str:
    """Return the heads of an attention module, or why the matrices do not divide into heads.

    A group is one key/value head with all the query heads that share it.

    Args:
        module: the attention.
        names: of its matrices for queries, keys, values, and the output.
        width: of a head.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> layer = LlamaModel(LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2)).layers[0]
        >>> names = ["q_proj", "k_proj", "v_proj", "o_proj"]
        >>> heads_of(layer.self_attn, names, 2).producers["q_proj"]
        Slabs(size=4, parts=1)
    """
    shapes = [widths(module.get_submodule(name)) for name in names]
    (queries, _), (keys, _), (values, _), (_, read) = shapes
    if keys % width or queries % keys or values != keys or read != queries:
        return (
            f"matrices of shapes {shapes} do not divide into heads of width {width} with equally "
            "many query heads each"
        )
    for name, parameter in module.named_parameters():
        own = name.rpartition(".")[0]
        if own not in names and (not own or parameter.shape != (width,)):  # but norms of a head
            return f"{name} may depend on the number of heads"
    count = keys // width
    sizes = (queries // count, width, width)
    producers = {name: Slabs(size) for name, size in zip(names[:-1], sizes, strict=True)}
    return Hidden(producers, names[-1], queries // count, count)


def attentions(names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield every parent of a known set of matrices, with their names in it.

    Args:
        names: dotted names of linear modules.

    Example:
        >>> list(attentions(["a.q_proj", "a.k_proj", "a.v_proj", "a.o_proj", "b.q_proj"]))
        [('a', ['q_proj', 'k_proj', 'v_proj', 'o_proj'])]
    """
    known = set(names)
    for producers, reader in ATTENTIONS:
        members = [*producers, reader]
        for name in names:
            parent, _, last = name.rpartition(".")
            if last == members[0] and known.issuperset(f"{parent}.{each}" for each in members):
                yield parent, members


def attention_layers(model: nn.Module, names: Sequence[str]) -> list[Layer]:
    """Return the attention modules among some matrices, and try which of them can lose heads.

    A module is called by itself, on random hidden states with the model's position embeddings, with
    all its heads and with half of them. Of modules with the same classes and shapes, only one is
    tried.

    Args:
        model: left unchanged.
        names: dotted names of the linear modules that may be cut.

    Example:
        >>> from transformers import LlamaConfig, LlamaModel
        >>> model = LlamaModel(LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...     num_attention_heads=4, num_key_value_heads=2))
        >>> names = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
        >>> [layer] = attention_layers(model, names)
        >>> layer.parent, layer.hidden.count, layer.reason
        ('layers.0.self_attn', 2, None)
    """
    known: dict[Hashable, str | None] = {}
    found = []
    for parent, members in attentions(names):
        module: Any = model.get_submodule(parent)
        width = getattr(module, "head_dim", None)
        hidden = heads_of(module, members, width) if isinstance(width, int) else ""
        if isinstance(hidden, str) or hidden.count < 2:
            continue
        key = signature(module)
        if key not in known:
            with resident(model, parent):
                known[key] = objection(module, hidden, call=_call(model, parent, members[0]))
        found.append(Layer(parent, hidden, reason=known[key]))
    return found


def _call(model: nn.Module, parent: str, reader: str) -> Call | None:
    """Return random hidden states and position embeddings, or None where a model makes none."""
    rotation = _rotation(model, parent)
    if rotation is None:
        return None
    matrix: Any = model.get_submodule(f"{parent}.{reader}")
    states = random_values(TOKENS, widths(matrix)[1], 1, matrix.weight).unsqueeze(0)
    places = torch.arange(TOKENS, device=states.device).unsqueeze(0)
    try:
        made: tuple[Tensor, Tensor] = rotation(states, places)
    except Exception:  # the model's code may raise anything; the trial then says why it fails
        return None
    return (states,), {"position_embeddings": made, "attention_mask": None}


def _rotation(model: nn.Module, name: str) -> Any:
    """Return the nearest module of position embeddings around a module, or None."""
    while name:
        name = name.rpartition(".")[0]
        found = getattr(model.get_submodule(name), ROTATION, None)
        if isinstance(found, nn.Module):
            return found
    return None
