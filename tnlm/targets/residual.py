"""Finds what reads and writes a model's residual stream, by running it on a few tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.targets.checks import check_plain
from tnlm.targets.ends import input_table
from tnlm.targets.stream_trace import TOKENS, Trace, trial

CLOSE = 1e-3
"""Error of a norm's output, relative to its input's normalized entries, that is rounding."""


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
        ModelError: if there are no token embeddings, weights are quantized or on the meta device,
            the model does not run on tokens alone, leaves a module with parameters out of the
            run, a norm is not an RMSNorm that linear layers read, or weights of the stream are
            shared other than by the embeddings and the head.

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
    for held, parameter in model.named_parameters():
        check_plain(held, parameter)
    [name] = [name for name, module in model.named_modules() if module is table]
    trace = Trace(model, table.embedding_dim)
    trial(model, trace.hooks)
    stream = _around(model, name, trace)
    _check_read(model, trace.read)
    _check_unshared(model, stream)
    return stream


def _around(model: nn.Module, table: str, trace: Trace) -> ResidualStream:
    """Return the norms, readers and writers of a run."""
    norms = {
        norm: Norm(offset=_offset(norm, model.get_submodule(norm)), readers=_readers(norm, reading))
        for norm, reading in trace.norms().items()
    }
    if not norms:
        raise ModelError(
            f"{type(model).__name__} has no norm with a weight as wide as its embeddings; the "
            "readers of the residual stream are found by such norms"
        )
    readers = [reader for norm in norms.values() for reader in norm.readers]
    for reader in readers:
        if readers.count(reader) > 1:
            both = [name for name, norm in norms.items() if reader in norm.readers]
            raise ModelError(
                f"{reader} reads {' and '.join(both)}, whose gains cannot both be folded into it; "
                "give every block a layer of its own"
            )
    writers = tuple(
        linear
        for linear in trace.linears
        if linear not in readers and _linear(model, linear).out_features == trace.width
    )
    return ResidualStream(table, trace.width, norms, writers)


def _readers(norm: str, found: tuple[str, ...]) -> tuple[str, ...]:
    if not found:
        raise ModelError(
            f"no linear layer reads what {norm} normalizes, so its gain cannot be folded into the "
            "layers that follow, and the residual stream cannot be rotated"
        )
    return found


def _check_read(model: nn.Module, read: set[int]) -> None:
    """Raise `ModelError` if a run did not read a parameter."""
    modules = {
        name: [id(parameter) in read for parameter in module.parameters()]
        for name, module in model.named_modules()
    }
    idle = {name for name, each in modules.items() if each and not any(each)}
    idle = {name for name in idle if name.rpartition(".")[0] not in idle}
    partly = {
        name
        for name, module in model.named_modules()
        if any(modules[name])
        and any(id(parameter) not in read for parameter in module.parameters(recurse=False))
    }
    names = [name for name in modules if name in idle | partly]
    if names:
        raise ModelError(
            f"{', '.join(names)} {'was' if len(names) == 1 else 'were'} not run by a trial on "
            "tokens, so it cannot be known whether the residual stream is read or written there, "
            "as it is by the projector of a vision-language model"
        )


def _check_unshared(model: nn.Module, stream: ResidualStream) -> None:
    """Raise `ModelError` if a weight is shared, other than by the embeddings and their reader."""
    touched = {stream.table, *stream.norms, *stream.readers, *stream.writers}
    tied = {stream.table, *stream.readers}
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for names in holders.values():
        is_head = stream.table in names and tied.issuperset(names)
        if len(names) > 1 and not is_head and touched.intersection(names):
            raise ModelError(
                f"{' and '.join(names)} share a weight; a rotation changes the weight of each by "
                "itself, so give each a copy first: "
                "module.weight = nn.Parameter(module.weight.detach().clone())"
            )


@torch.no_grad()
def _offset(name: str, norm: nn.Module) -> float:
    """Return what must be added to an RMSNorm's weight for its gain.

    Raises:
        ModelError: if the module is none.
    """
    exact: Any = copy.deepcopy(norm).double()
    weight: Tensor = exact.weight
    drawn = torch.randn(TOKENS, len(weight), generator=torch.Generator().manual_seed(0))
    rows = drawn.to(weight)
    plain = rows / rows.square().mean(-1, keepdim=True).sqrt()
    made: Tensor = exact(rows)
    errors = {}
    for offset in (0.0, 1.0):  # by column, where one large gain hides no other
        gain = weight + offset
        scale = plain.abs().amax(0) * gain.abs().clamp(min=1.0)
        errors[offset] = float(((made - plain * gain).abs().amax(0) / scale).max())
    best = min(errors, key=errors.__getitem__)
    if errors[best] <= CLOSE:
        return best
    raise ModelError(
        f"{name} is a {type(norm).__name__}; only an RMSNorm computes the same in every basis. One "
        "that subtracts a mean or adds a bias, as a LayerNorm does, cannot be folded, so the "
        "residual stream of this model cannot be rotated"
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    found: Any = model.get_submodule(name)
    linear: nn.Linear = found
    return linear
