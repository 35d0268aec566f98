"""What a model can be run on: token ids that it knows, and no more of them than it has positions.

A table of positions is found by looking: two short sequences are run, and the table is the one in
which the last token's row moves on by one. So are the rows before the first token, which RoBERTa
and OPT leave out. A rotary model has no such table, and no limit here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tnlm.calibration.inputs import MEDIA, takes
from tnlm.calibration.walk import eval_mode, run
from tnlm.errors import CalibrationError
from tnlm.targets.ends import input_table, vocabulary_of

SHORT = (2, 3)
"""Lengths of the sequences on which a table of positions is looked for."""
_REFUSALS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a model's own code raises on a sequence that it does not take."""


def positions_of(model: PreTrainedModel) -> int | None:
    """Return how many tokens a model's table of positions has room for, or None without a table.

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
    """Raise `CalibrationError` unless a model can be run on batches of token ids.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> tiny = GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> ids = torch.tensor([[6, 7, 8]])
        >>> check_batches(tiny, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: the calibration data has the token id 8, but the model ...
    """
    if not batches:
        return
    inputs, name = takes(model), type(model).__name__
    if "input_ids" not in inputs and "args" not in inputs:
        raise CalibrationError(
            f"a {name} takes no token ids, and nothing else is measured; use a scheme and a metric "
            "that look at no data, such as svd"
        )
    known, largest = vocabulary_of(model), max(int(b["input_ids"].max()) for b in batches)
    if known is not None and largest >= known:
        raise CalibrationError(
            f"the calibration data has the token id {largest}, but the model knows {known} tokens; "
            "use the tokenizer that belongs to the model"
        )
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    room = positions_of(model)
    if room is not None and longest > room:
        raise CalibrationError(
            f"the calibration data has sequences of {longest} tokens, but the model has {room} "
            f"positions; use max_length<={room}"
        )
    if inputs & set(MEDIA):
        _try(model, batches[0], name)


def _try(model: PreTrainedModel, batch: Mapping[str, Tensor], name: str) -> None:
    """Raise `CalibrationError` if a model that takes more than text cannot do without it."""
    row = {key: value[:1] for key, value in batch.items()}
    try:
        with eval_mode(model), torch.inference_mode():
            run(model, row)
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as err:
        raise CalibrationError(
            f"a {name} does not run on token ids alone, and nothing else is measured ({err}); use "
            "a scheme and a metric that look at no data, such as svd"
        ) from err


class _Lookups(TorchDispatchMode):
    """Records the largest row that is read of every table with one row a token."""

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
    """Yield the room of every table of positions that short sequences look into."""
    own = input_table(model)
    tables = [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not own]
    if not tables or "input_ids" not in takes(model):
        return
    # A model that counts positions by tokens passes over padding.
    token = int(getattr(model.config.get_text_config(), "pad_token_id", None) == 0)
    seen = []
    for length in SHORT:
        ids = torch.full((1, length), token)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        lookups = _Lookups(length)
        try:
            with eval_mode(model), torch.no_grad(), lookups:
                run(model, batch, model.base_model)
        except _REFUSALS:  # it has needs of its own: nothing is known
            return
        seen.append(lookups.largest)
    for table, (row, rows) in seen[0].items():
        if seen[1].get(table) == (row + 1, rows):
            yield rows - (row + 1 - SHORT[0])


def _buffers(model: PreTrainedModel) -> Iterator[int]:
    """Yield the rows of tables that are computed and not learned, as GPT-J has."""
    for module in model.modules():
        table = dict(module.named_buffers(recurse=False)).get("embed_positions")
        if isinstance(table, Tensor) and table.dim() == 2:
            yield len(table)
