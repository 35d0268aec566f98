"""Finds what reads and writes a model's residual stream, by running it on a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.targets.ends import input_table
from tnlm.utils.training_flags import modes_kept

TOKENS = 8
"""Number of tokens of a trial."""


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream.

    Attributes:
        readers: names of the linear layers that read its output.
        offset: what is added to its weight, which is its gain then: 0, or 1 as in Gemma.
    """

    readers: tuple[str, ...]
    offset: float


@dataclass(frozen=True)
class ResidualStream:
    """The modules around a residual stream.

    Attributes:
        table: name of the token embeddings.
        width: the stream's width.
        norms: its norms, by name.
        writers: names of the linear layers whose outputs are added to it.
    """

    table: str
    width: int
    norms: Mapping[str, Norm]
    writers: tuple[str, ...]

    @property
    def readers(self) -> Mapping[str, str]:
        """The norm that each reader reads, by the reader's name."""
        return {reader: name for name, norm in self.norms.items() for reader in norm.readers}


def residual_stream(model: PreTrainedModel) -> ResidualStream:
    """Find the readers and writers of a model's residual stream.

    Readers are the linear layers called with the output of a norm that is as wide as the
    embeddings; all other linear layers with as many outputs are taken for writers. What is made of
    them must be tried, see `tnlm.compression.rotate`.

    Args:
        model: run on a few tokens; left unchanged.

    Raises:
        ModelError: if there are no token embeddings, the model does not run on tokens alone, or a
            norm is not an RMSNorm that linear layers read.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> stream = residual_stream(LlamaForCausalLM(tiny))
        >>> stream.writers
        ('model.layers.0.self_attn.o_proj', 'model.layers.0.mlp.down_proj')
        >>> stream.readers["lm_head"]
        'model.norm'
    """
    table = input_table(model)
    if not isinstance(table, nn.Embedding):
        raise ModelError(f"{type(model).__name__} has no table of token embeddings")
    [name] = [name for name, module in model.named_modules() if module is table]
    width = table.embedding_dim
    trace = _Trace(model, width)
    trial(model, trace.hooks)
    norms = {
        norm: Norm(
            offset=_offset(norm, model.get_submodule(norm)), readers=_readers(trace, norm, made)
        )
        for norm, made in trace.normed.items()
    }
    readers = {reader for norm in norms.values() for reader in norm.readers}
    writers = tuple(
        linear
        for linear in trace.linears
        if linear not in readers and _linear(model, linear).out_features == width
    )
    return ResidualStream(name, width, norms, writers)


@torch.no_grad()
def trial(model: PreTrainedModel, hooks: Any = ExitStack) -> Tensor:
    """Return a model's logits for a few tokens.

    Args:
        model: runs in evaluation mode.
        hooks: returns a context of the run.

    Raises:
        ModelError: if the model fails, or computes no finite logits.
    """
    table: Any = input_table(model)
    ids = (torch.arange(TOKENS) % table.num_embeddings).unsqueeze(0).to(table.weight.device)
    with modes_kept(model), hooks():
        model.eval()
        try:
            found = model(input_ids=ids).get("logits")
        except Exception as error:  # the model's code may raise anything
            raise ModelError(
                f"{type(model).__name__} cannot be run on tokens alone ({error})"
            ) from error
    if found is None or not bool(found.isfinite().all()):
        what = "no logits" if found is None else "logits that are not finite"
        raise ModelError(f"{type(model).__name__} computes {what}; give a model with its head")
    logits: Tensor = found
    return logits


class _Trace:
    """What the norms and linear layers of a run were given, and what the norms made of it."""

    def __init__(self, model: nn.Module, width: int) -> None:
        self._model, self._width = model, width
        self.normed: dict[str, Tensor] = {}
        self.linears: dict[str, Tensor] = {}

    def hooks(self) -> ExitStack:
        """Note the calls as long as the context lasts."""
        stack = ExitStack()
        for name, module in self._model.named_modules():
            if isinstance(module, nn.Linear) or self._is_norm(module):
                handle = module.register_forward_hook(partial(self._note, name))
                stack.callback(handle.remove)
        return stack

    def _is_norm(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        is_leaf = not any(True for _ in module.children())
        return is_leaf and isinstance(weight, Tensor) and weight.shape == (self._width,)

    def _note(self, name: str, module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        if isinstance(module, nn.Linear):
            self.linears[name] = given[0]
        else:
            self.normed[name] = made


def _readers(trace: _Trace, norm: str, made: Tensor) -> tuple[str, ...]:
    """Return the linear layers that were given a norm's output, or a part of it."""
    memory = made.untyped_storage().data_ptr()
    found = trace.linears.items()
    readers = tuple(name for name, x in found if x.untyped_storage().data_ptr() == memory)
    if not readers:
        raise ModelError(
            f"no linear layer reads what {norm} normalizes, so its gain cannot be folded into the "
            "layers that follow, and the residual stream cannot be rotated"
        )
    return readers


def _offset(name: str, norm: Any) -> float:
    """Return what must be added to an RMSNorm's weight for its gain.

    Raises:
        ModelError: if the module is none.
    """
    weight: Tensor = norm.weight.detach()
    drawn = torch.randn(TOKENS, len(weight), generator=torch.Generator().manual_seed(0))
    rows = drawn.to(weight)
    plain = rows / rows.square().mean(-1, keepdim=True).sqrt()
    close = max(1e-3, 4 * torch.finfo(weight.dtype).eps)
    with torch.no_grad():
        made: Tensor = norm(rows)
    for offset in (0.0, 1.0):
        wanted = plain * (weight + offset)
        if float((made - wanted).abs().max()) <= close * float(wanted.abs().max()):
            return offset
    raise ModelError(
        f"{name} is a {type(norm).__name__}; only an RMSNorm computes the same in every basis. One "
        "that subtracts a mean or adds a bias, as a LayerNorm does, cannot be folded, so the "
        "residual stream of this model cannot be rotated"
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found: Any = model.get_submodule(name)
    linear: nn.Linear = found
    return linear
