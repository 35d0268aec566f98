"""Checks that a model can run on data: its vocabulary, its positions, and the inputs it needs.

A table of positions is found by running two short sequences: in this table, the last token's row
moves by one. This also finds unused rows before the first token, as in RoBERTa and OPT. A rotary
model has no such table, and no limit here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tnlm.calibration.inputs import MEDIA, takes
from tnlm.calibration.loss import media_tokens
from tnlm.calibration.passes import run
from tnlm.calibration.walk import eval_mode
from tnlm.errors import CalibrationError
from tnlm.targets.ends import input_table, vocabulary_of

SHORT = (2, 3)
"""Lengths of the sequences that are run to find a table of positions."""
_IDS = ("input_ids", "decoder_input_ids")
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that models raise on sequences that they do not accept."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Return the length of a model's table of positions in tokens, or None without a table.

    Example:
        >>> from transformers import RobertaConfig, RobertaModel
        >>> tiny = RobertaConfig(vocab_size=8, hidden_size=4, intermediate_size=4,
        ...                      num_hidden_layers=1, num_attention_heads=1,
        ...                      max_position_embeddings=10, pad_token_id=1)
        >>> positions_of(RobertaModel(tiny))  # two rows are for padding
        8
    """
    found = [*_buffers(model), *_tables(model)]
    return min(found, default=None)


def check_batches(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise `CalibrationError` unless a model can run on batches.

    Token ids must be in the vocabulary and have positions; a multimodal model is run on one batch
    of each kind.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> ids = torch.tensor([[6, 7, 8]])
        >>> check_batches(tiny, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: the calibration data has the token id 8, but the model ...
    """
    texts = [batch[name] for batch in batches for name in _IDS if name in batch]
    if texts:
        _check_ids(model, texts)
    media = takes(model) & set(MEDIA)
    if media or any("input_ids" not in batch for batch in batches):
        kinds = {frozenset(batch): batch for batch in reversed(batches)}
        for batch in kinds.values():
            _try(model, batch)


def _check_ids(model: PreTrainedModel, texts: Sequence[Tensor]) -> None:
    known, places = vocabulary_of(model), torch.tensor(media_tokens(model), dtype=torch.int64)
    words = [ids[~torch.isin(ids, places)] for ids in texts]
    largest = max(int(ids.max()) for ids in words if ids.numel())
    if known is not None and largest >= known:
        raise CalibrationError(
            f"the calibration data has the token id {largest}, but the model has {known} tokens; "
            "use the model's own tokenizer"
        )
    check_length(model, max(ids.shape[1] for ids in texts))


def check_length(model: PreTrainedModel, length: int) -> None:
    """Raise `CalibrationError` if a sequence has more tokens than the model has positions."""
    room = positions_of(model)
    if room is not None and length > room:
        raise CalibrationError(
            f"the calibration data has sequences of {length} tokens, but the model has {room} "
            f"positions; use max_length<={room}",
            argument="max_length",
        )


def _try(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """Raise `CalibrationError` if a multimodal model does not run on a batch."""
    try:
        with eval_mode(model), torch.inference_mode():
            run(model, batch)
    except (torch.OutOfMemoryError, CalibrationError):
        raise
    except _REFUSALS as err:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise CalibrationError(
            f"a {type(model).__name__} does not run on {shapes} ({err}); give batches as the "
            "model's processor makes them, or use a scheme and a metric that look at no data, such "
            "as svd"
        ) from err


class _Lookups(TorchDispatchMode):
    """Records the largest row read from every table with one row per token."""

    def __init__(self, length: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = length
        self.largest: dict[int, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default and args[1].numel() == self.length:
            table, rows = args[0], args[1]
            self.largest[table.data_ptr()] = int(rows.max()), len(table)
        return func(*args, **(kwargs or {}))


def _tables(model: PreTrainedModel) -> Iterator[int]:
    """Yield the length of every table of positions that short sequences read."""
    own = input_table(model)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not own]
    if not tables or "input_ids" not in takes(model):
        return
    # A model that derives positions from tokens skips padding.
    token = int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)
    seen = []
    for length in SHORT:
        ids = torch.full((1, length), token)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lookups = _Lookups(length)
        try:
            with eval_mode(model), torch.no_grad(), lookups:
                run(model, batch, model.base_model)
        except _REFUSALS:  # it needs other inputs, so nothing is known
            return
        seen.append(lookups.largest)
    for table, (row, rows) in seen[0].items():
        if seen[1].get(table) == (row + 1, rows):
            yield rows - (row + 1 - SHORT[0])


def _buffers(model: PreTrainedModel) -> Iterator[int]:
    """Yield the lengths of tables that are computed instead of learned, as in GPT-J."""
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("embed_positions")
        if isinstance(table, Tensor) and table.dim() == 2:
            yield len(table)
