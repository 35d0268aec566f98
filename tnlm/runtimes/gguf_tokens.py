"""A tokenizer as GGUF files describe it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tnlm.errors import ModelError

NORMAL, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 3, 4, 5, 6
"""Types of tokens in GGUF files."""

_LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_LLAMA % "{1,3}", "ByteLevel"): "llama-bpe",
    (_LLAMA % "", "ByteLevel"): "qwen2",
}
"""What llama.cpp calls the ways to split a text into words, by the steps of a tokenizer.json."""


@dataclass(frozen=True)
class Tokens:
    """The fields of a GGUF file that concern the tokenizer.

    Attributes:
        model: ``"gpt2"`` for byte-level BPE, ``"llama"`` for SentencePiece.
        split: how a text is split into words; empty for SentencePiece.
        tokens: texts by id.
        types: by id.
        merges: pairs of texts, best first; for byte-level BPE.
        scores: by id; for SentencePiece.
        special: ids by their role, such as ``"bos"``.
        add_bos: whether texts begin with BOS.
        add_space: whether texts begin with a space; for SentencePiece.
        chat_template: empty if there is none.
    """

    model: str
    split: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    special: Mapping[str, int]
    add_bos: bool
    add_space: bool
    chat_template: str


def read_tokens(tokenizer: Any, size: int) -> Tokens:
    """Return what a GGUF file says of a tokenizer.

    Args:
        tokenizer: a fast tokenizer.
        size: rows of the embedding; ids without a token become unused ones.

    Raises:
        ModelError: for a tokenizer of another kind than byte-level BPE and SentencePiece's BPE, or
            one that splits words in a way that llama.cpp does not know.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"{type(tokenizer).__name__} has no tokenizer.json to write to GGUF")
    read = json.loads(backend.to_str())
    model = read["model"]
    if model["type"] != "BPE":
        raise ModelError(f"a {model['type']} tokenizer cannot be written to GGUF; allowed: BPE")
    pieces = bool(model.get("byte_fallback"))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tokens, types = _tokens(tokenizer, size, pieces)
    return Tokens(
        model="llama" if pieces else "gpt2",
        split="" if pieces else _split(read["pre_tokenizer"]),
        tokens=tokens,
        types=types,
        merges=[] if pieces else merges,
        scores=_scores(tokens, merges) if pieces else [],
        special=_special(tokenizer),
        add_bos=_begins(tokenizer),
        add_space=pieces and "prepend" in json.dumps(read["normalizer"]).lower(),
        chat_template=_template(tokenizer),
    )


def _tokens(tokenizer: Any, size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Return every token with its type, by id."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    for text, number in tokenizer.get_vocab().items():
        if number >= size:
            raise ModelError(f"token {text!r} has id {number}, but the embedding has {size} rows")
        is_byte = pieces and len(text) == 6 and text.startswith("<0x")
        tokens[number], types[number] = text, BYTE if is_byte else NORMAL
    for number, added in tokenizer.added_tokens_decoder.items():
        types[number] = CONTROL if added.special else USER_DEFINED
    return tokens, types


def _split(steps: Any) -> str:
    """Return the name of the way in which words are split."""
    found = []
    for step in (steps or {}).get("pretokenizers", [steps]) if steps else []:
        pattern = step.get("pattern", {})
        found.append(pattern.get("Regex") or pattern.get("String") or step["type"])
    name = SPLITS.get(tuple(found))
    if name is None:
        raise ModelError(
            f"llama.cpp has no name known here for a tokenizer that splits by {found}; known: "
            + ", ".join(SPLITS.values())
        )
    return name


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores by which SentencePiece merges in the order of the merges."""
    rank = {merge.replace(" ", ""): number for number, merge in reversed(list(enumerate(merges)))}
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _special(tokenizer: Any) -> dict[str, int]:
    roles = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")}
    found = roles | {"pad": tokenizer.pad_token_id}
    return {name: number for name, number in found.items() if number is not None}


def _begins(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else ""
