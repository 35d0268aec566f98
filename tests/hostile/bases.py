"""Small sound checkpoints, of every format and kind of entry, to be broken."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import tnlm
from tnlm.schemes import schemes

WORDS = 64
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
REFERENCE = "reference.pt"


class Base(NamedTuple):
    """A model, a scheme, and how it is saved."""

    kind: str
    scheme: str
    saved: dict[str, Any]


BASES = {
    "low-rank": Base("llama", "svd", {}),
    "shards": Base("llama", "svd", {"max_shard_size": "20KB"}),
    "fused": Base("gpt2", "kron", {}),
    "bias": Base("gpt2", "afm", {}),
    "bert": Base("bert", "svd", {}),
    "tied": Base("tied-llama", "albert", {}),
    "table": Base("tied-llama", "tensorgpt", {}),
    "rows": Base("gpt2", "shapeshifter", {}),
    "train": Base("llama", "tt", {}),
    "ring": Base("llama", "tr", {}),
    "tucker": Base("llama", "tucker", {}),
    "blocks": Base("llama", "btt", {}),
    "shared": Base("llama", "basis-sharing", {}),
    "sliced": Base("llama", "modegpt", {}),
}


def make(root: Path, names: Iterable[str]) -> None:
    """Compress and save bases below a directory, each with the logits it must give."""
    for name in names:
        base = BASES[name]
        model = _model(base.kind)
        data: dict[str, Any] = {}
        if schemes()[base.scheme].needs_calibration:
            data = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
        tnlm.compress(model, base.scheme, progress=False, **data)
        tnlm.save(model, root / name, **base.saved)
        torch.save(logits(model), root / f"{name}-{REFERENCE}")


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Return what a model says of some tokens; of its first layer, if it has no head."""
    with torch.no_grad():
        return model(IDS)[0]


def _model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48} | layers
    if kind == "gpt2":
        narrow = {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
        ends = {"bos_token_id": 2, "eos_token_id": 2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **narrow, **ends)).eval()
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes)).eval()
    tied = {"tie_word_embeddings": kind == "tied-llama", "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tied)).eval()
