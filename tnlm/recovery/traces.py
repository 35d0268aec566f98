"""Records intermediate states of a pass: embedded tokens, feed-forward outputs, attention maps.

Attention maps are available with every kernel: while a model is traced, its attention function is
replaced by one that computes the probabilities like transformers' own and keeps their logarithms.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tnlm.calibration.blocks import Blocks, find_blocks, state_of
from tnlm.errors import ModelError

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
"""Names of the part of a block whose output is kept; without it, the block's own output is."""


@dataclass
class Trace:
    """The intermediate states of one pass.

    Attributes:
        embedding: embedded tokens ``(sequences, length, width)``, before positions are added.
        hidden: feed-forward outputs, the same shape, by block.
        maps: attention log-probabilities ``(sequences, heads, queries, keys)``, by block.
    """

    embedding: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)
    maps: dict[int, Tensor] = field(default_factory=dict)


class Traces:
    """Records the intermediate states of a model, within :meth:`attached`.

    Args:
        model: a transformers model, possibly with adapters.
        embedding: whether to keep embedded tokens.
        hidden: the blocks whose feed-forward outputs to keep.
        maps: the blocks whose attention maps to keep.

    Raises:
        ModelError: if blocks are given and the model does not have exactly one stack of blocks.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        embedding: bool = False,
        hidden: Collection[int] = (),
        maps: Collection[int] = (),
    ) -> None:
        """Find the blocks; see the class for the arguments."""
        self._model = model
        self._embedding, self._hidden, self._maps = embedding, hidden, maps
        blocks = [block for _, block in model_blocks(model)] if hidden or maps else []
        self._blocks = {index: blocks[index] for index in {*hidden, *maps}}
        self._owner = {id(part): index for index in maps for part in blocks[index].modules()}
        self._trace: Trace | None = None

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Attach hooks to the model, and remove them afterwards.

        The whole training must run inside, since gradient checkpointing repeats parts of a pass.
        """
        with contextlib.ExitStack() as stack:
            if self._embedding:
                stack.callback(_watch(self._model.get_input_embeddings(), self._keep_embedding))
            for index in self._hidden:
                part = _feed_forward(self._blocks[index])
                stack.callback(_watch(part, functools.partial(self._keep_hidden, index)))
            if self._maps:
                stack.enter_context(self._attention())
            yield

    @contextlib.contextmanager
    def recording(self) -> Iterator[Trace]:
        """Keep the states of the passes inside."""
        self._trace = Trace()
        try:
            yield self._trace
        finally:
            self._trace = None

    def _keep_embedding(self, output: Tensor) -> None:
        if self._trace is not None:
            self._trace.embedding = output

    def _keep_hidden(self, index: int, output: Tensor) -> None:
        if self._trace is not None:
            self._trace.hidden[index] = output

    @contextlib.contextmanager
    def _attention(self) -> Iterator[None]:
        """Replace the model's attention function, under a temporary name."""
        name, before = f"tnlm_traces_{id(self)}", self._model.config._attn_implementation
        ALL_ATTENTION_FUNCTIONS[name] = self._attend
        # Masks must be registered for the whole class; there is no public way to unregister.
        AttentionMaskInterface.register(name, eager_mask)
        try:
            self._model.set_attn_implementation(name)
            if self._model.config._attn_implementation != name:
                raise ModelError(
                    f"the attention maps of {type(self._model).__name__} cannot be recorded: its "
                    "code does not use attention functions; use attention=0"
                )
            yield
        finally:
            self._model.set_attn_implementation(before)
            del ALL_ATTENTION_FUNCTIONS[name], AttentionMaskInterface._global_mapping[name]

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        """Attend like transformers' eager attention, and keep the map before dropout."""
        logs = log_probabilities(query, key, attention_mask, scaling, **arguments)
        index = self._owner.get(id(module))
        if self._trace is not None and index is not None:
            self._trace.maps.setdefault(index, logs)  # cross-attention comes second
        shares = F.dropout(logs.exp().to(value.dtype), p=dropout, training=module.training)
        mixed = shares @ _for_heads(value, query.shape[1])
        return mixed.transpose(1, 2).contiguous(), None


def log_probabilities(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Return attention log-probabilities, in float32.

    Args:
        query: ``(sequences, heads, queries, width)``.
        key: ``(sequences, key heads, keys, width)``; with fewer key heads, query heads share them.
        mask: added to the scores; None to attend everywhere.
        scaling: factor of the scores; 1/√width by default.
        softcap: bound that the scores approach smoothly.
        position_bias: added to the scores.
        s_aux: attention sinks, which are not supported.

    Raises:
        ModelError: if attention has sinks, so that its maps do not sum to 1.
    """
    if s_aux is not None:
        raise ModelError("maps of attention with sinks cannot be compared; use attention=0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ _for_heads(key, query.shape[1]).transpose(2, 3) * scale).float()
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    for added in (position_bias, mask):
        scores = scores if added is None else scores + added
    return scores.log_softmax(-1)


def model_blocks(model: nn.Module) -> Blocks:
    """Return the names and blocks of a model's single stack.

    Raises:
        ModelError: if it has none, or several, as in encoder-decoder models.
    """
    holders = [name for name, part in model.named_modules() if [*part.parameters(recurse=False)]]
    blocks = find_blocks(model, holders)
    if not blocks:
        raise ModelError(
            f"{type(model).__name__} does not have exactly one stack of blocks, which comparing "
            "hidden states or attention maps needs; use hidden=0 and attention=0"
        )
    return blocks


def _feed_forward(block: nn.Module) -> nn.Module:
    return next((part for name, part in block.named_children() if name in FEED_FORWARD), block)


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat key or value heads, one for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _watch(module: nn.Module, keep: Callable[[Tensor], None]) -> Callable[[], None]:
    """Pass a module's outputs to a function; return a function that stops this."""

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        keep(state_of(output))

    return module.register_forward_hook(hook).remove
