"""Finds a model's token embeddings, its output head and its vocabulary size."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def input_table(model: PreTrainedModel) -> nn.Module | None:
    """Return the table of token embeddings, or None if the model defines none.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> input_table(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
        Embedding(8, 4)
    """
    try:
        found = model.get_input_embeddings()
    except (
        NotImplementedError,
        AttributeError,
    ):  # models of images or audio, or with several towers
        return None
    return found if isinstance(found, nn.Module) else None


def output_head(model: PreTrainedModel) -> nn.Module | None:
    """Return the output head over the vocabulary, or None for a model without one.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> output_head(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))) is None
        True
    """
    try:
        found = model.get_output_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, nn.Module) else None


def vocabulary_of(model: PreTrainedModel) -> int | None:
    """Return a model's vocabulary size: the rows of its table, or else its config's value.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> vocabulary_of(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
        8
    """
    table = input_table(model)
    rows = getattr(table, "num_embeddings", None)
    if not isinstance(rows, int):
        rows = getattr(model.config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None
