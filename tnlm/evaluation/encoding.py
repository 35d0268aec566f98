"""Contexts and continuations as tokens, split the way lm-evaluation-harness splits them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tnlm.ends import vocabulary_of
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import check_positions, room_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")
_UNSET = 10**29  # transformers writes 10**30 where a tokenizer names no length
_DEFAULT = 2048


@dataclass(frozen=True)
class Encoded:
    """A context and its continuation as tokens.

    Attributes:
        context: tokens that are given, at least one.
        continuation: tokens whose likelihood is asked for.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


def window_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> int:
    """Return how many tokens the model is shown at most: its positions, unless fewer are asked for.

    Args:
        model: whose config is asked first.
        tokenizer: asked next; without an answer it is 2048.
        max_length: what the user asks for.
    """
    if max_length is not None:
        if max_length < 2:
            raise OptionError(f"max_length={max_length}, but at least 2 are needed")
        check_positions(model, max_length, f"max_length={max_length}")
        return max_length
    config = model.config.get_text_config()
    named = [getattr(config, name, None) for name in _POSITIONS]
    if any(named):
        named.insert(0, room_of(model))  # a table may have less room than the config says
    named.append(getattr(tokenizer, "model_max_length", None))
    return int(next((n for n in named if n is not None and n < _UNSET), _DEFAULT))


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before a text without context: BOS, or else EOS."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise EvaluationError("the tokenizer has no BOS and no EOS token to start a text with")


def encode(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool | None = None
) -> list[int]:
    """Tokenise a text with the special tokens that the tokenizer adds by itself.

    A text that begins with BOS already gets none.

    Args:
        tokenizer: of the model.
        text: the text.
        special: whether to add special tokens, if that is not left to the tokenizer.
    """
    start = tokenizer.decode(first_token(tokenizer))
    if special is None and isinstance(start, str) and start and text.startswith(start):
        special = False
    options = {} if special is None else {"add_special_tokens": special}
    # verbose=False: a text longer than the model is cut later.
    return list(tokenizer(text, verbose=False, **options)["input_ids"])


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Encoded:
    """Tokenise a pair as one text and split it where the context's own tokens end.

    Spaces at the end of the context move to the continuation. Without a context the continuation
    follows BOS (or EOS).

    Args:
        tokenizer: of the model.
        context: what is given; may be empty.
        continuation: what is scored.
    """
    if context == "":
        ids, start = encode(tokenizer, continuation, special=False), first_token(tokenizer)
        if ids and ids[0] == start:
            return Encoded((start,), tuple(ids[1:]))
        return Encoded((start,), tuple(ids))
    kept = context.rstrip()
    continuation, context = context[len(kept) :] + continuation, kept
    whole, before = encode(tokenizer, context + continuation), encode(tokenizer, context)
    return Encoded(tuple(before), tuple(whole[len(before) :]))


def encode_all(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    window: int,
) -> list[Encoded]:
    """Tokenise pairs, and raise where one cannot be scored.

    Args:
        tokenizer: of the model.
        pairs: contexts and continuations.
        names: of the items they belong to, for errors.
        window: most tokens that the model is shown.

    Raises:
        EvaluationError: naming the item whose continuation is empty or longer than the window.
    """
    found = []
    for (context, continuation), name in zip(pairs, names, strict=True):
        pair = encode_pair(tokenizer, context, continuation)
        if not pair.context or not pair.continuation:
            raise EvaluationError(f"{name}: {continuation!r} has no tokens of its own to score")
        if len(pair.continuation) > window:
            raise EvaluationError(
                f"{name}: a choice has {len(pair.continuation)} tokens, but the window has "
                f"{window}; use a longer window or leave the item out"
            )
        found.append(pair)
    return found


def check_vocabulary(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], names: Sequence[str]
) -> None:
    """Raise if the tokenizer gave tokens that the model does not know; names are of the items."""
    size = vocabulary_of(model)
    for tokens, name in zip(texts, names, strict=True):
        if size is not None and (most := max(tokens)) >= size:
            raise EvaluationError(
                f"{name}: the tokenizer gives the id {most}, but the model knows {size} tokens; "
                "use the tokenizer that belongs to the model"
            )
