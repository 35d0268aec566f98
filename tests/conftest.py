"""Tiny models and an offline tokenizer for all tests."""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import tnlm
from tnlm.compression.register import KINDS
from tnlm.metrics.named import get_measure
from tnlm.schemes import schemes
from tnlm.schemes.base import Scheme

# Tiny matrices gain nothing from threads, and lose much when test runs share a machine.
torch.set_num_threads(1)

# The measurements of this machine are made once for all workers, and not kept.
os.environ.setdefault("TNLM_HOME", str(Path(tempfile.gettempdir()) / "tnlm-tests"))

settings.register_profile("tnlm", derandomize=True, deadline=None, max_examples=30)
settings.load_profile("tnlm")

WORDS = [f"word{i}" for i in range(61)]
VOCAB_SIZE = len(WORDS) + 3
PACKED = [name for name, scheme in schemes().items() if scheme.precision is not None]
"""Schemes that store weights as codes, which are buffers and no parameters."""
NEED_DATA = [name for name, scheme in schemes().items() if scheme.needs_calibration]


def short_training(scheme: str) -> dict[str, int]:
    """Return the arguments that make the training of a scheme short."""
    named = schemes()[scheme]
    few = {"recover_tokens": 256} if named.recover != "none" else {}
    return few | ({"refine_passes": 1} if named.refine_passes else {})


def sort_of(scheme: Scheme) -> str:
    """Return what of a scheme depends on the model: what it replaces, shares and adds."""
    tables = {"embeddings", "token-embeddings"} & set(np.atleast_1d(scheme.targets))
    if tables:
        return "tables" if len(np.atleast_1d(scheme.targets)) == 1 else "tables and matrices"
    if not scheme.formats:
        return "bits"
    if "channels" in scheme.formats:
        return "channels"
    if scheme.share > 1:
        return "shared factors"
    if get_measure(scheme.metric).adds_bias:
        return "biases"
    return "low rank" if scheme.formats == ("low-rank",) else "tensors"


def cover(*kinds: str) -> list[tuple[str, str]]:
    """Return kinds of models paired with schemes: a pairwise cover in place of the product.

    Every kind, every scheme, and every kind with every sort of scheme stands in some pair.
    """
    sorts: dict[str, list[str]] = {}
    for name, scheme in schemes().items():
        if scheme.targets == "experts":  # for which mixtures have tests of their own
            continue
        sorts.setdefault(sort_of(scheme), []).append(name)
    counts = {sort: max(len(names), len(kinds)) for sort, names in sorts.items()}
    return [
        (kinds[i % len(kinds)], names[i % len(names)])
        for sort, names in sorts.items()
        for i in range(counts[sort])
    ]


def one_each(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the first pair of every scheme."""
    first: dict[str, str] = {}
    for kind, scheme in pairs:
        first.setdefault(scheme, kind)
    return [(kind, scheme) for scheme, kind in first.items()]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave what was imported and collected out of garbage collections.

    A Trainer collects garbage four times, and each time would walk all that torch and transformers
    hold, which takes longer than its few steps.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Make a Llama with grouped queries; keywords override its config."""

    def make(*, seed: int = 0, tie_word_embeddings: bool = False, **config: Any):
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
        torch.manual_seed(seed)
        config = sizes | {"tie_word_embeddings": tie_word_embeddings} | config
        return LlamaForCausalLM(LlamaConfig(**config)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_gpt2() -> Callable[..., GPT2LMHeadModel]:
    """Make a GPT-2: Conv1D layers, fused c_attn, biases, a tied head."""

    def make(*, seed: int = 0, **config: Any):
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "n_embd": 32,
            "n_inner": 48,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "bos_token_id": 2,
            "eos_token_id": 2,
        }
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**(sizes | config))).eval()

    return make


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[..., BertModel]:
    """Make a BERT encoder: bidirectional, no language-model head."""

    def make(*, seed: int = 0, **config: Any):
        sizes = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        }
        torch.manual_seed(seed)
        return BertModel(BertConfig(**(sizes | config))).eval()

    return make


@pytest.fixture
def registries(monkeypatch) -> None:
    """Forget afterwards what a test registers."""
    for _, registry in KINDS:
        monkeypatch.setattr(registry, "_added", dict(registry._added))


@pytest.fixture(scope="session")
def make_model(tiny_llama, tiny_gpt2, tiny_bert) -> Callable[[str], PreTrainedModel]:
    """Make a model by its kind; with these, ids 3 to 63 are words."""

    def masked_bert() -> BertForMaskedLM:
        torch.manual_seed(0)
        return BertForMaskedLM(tiny_bert().config).eval()

    makers = {
        "llama": tiny_llama,
        "tied-llama": functools.partial(tiny_llama, tie_word_embeddings=True),
        "gpt2": tiny_gpt2,
        "bert": tiny_bert,
        "masked-bert": masked_bert,
    }
    return lambda kind: makers[kind]()


@pytest.fixture(scope="session")
def compressed(make_model) -> Callable[..., PreTrainedModel]:
    """Compress a model of some kind with some scheme; each is fitted once and copied."""

    @functools.cache
    def fit(kind: str, scheme: str, **arguments: Any) -> PreTrainedModel:
        if scheme in NEED_DATA:
            arguments |= {"calibration": torch.arange(256) % 61 + 3, "max_length": 32}
        arguments = short_training(scheme) | arguments
        return tnlm.compress(make_model(kind), scheme, **arguments)

    return lambda *args, **arguments: copy.deepcopy(fit(*args, **arguments))


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """Map ``word0`` ... ``word60`` to ids 3 ... 63; every other word is unknown (1)."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", "<s>", *WORDS])}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<s>",
        model_max_length=16,
    )


@pytest.fixture(scope="session")
def word_text() -> Callable[..., str]:
    """Make a text of ``count`` words that the tokenizer knows."""

    def make(count: int, *, seed: int = 0) -> str:
        return " ".join(random.Random(seed).choices(WORDS, k=count))

    return make


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., torch.Tensor]:
    """Make a normal tensor in float64, the same for the same seed."""

    def make(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return make
