"""What every example starts from: a model, its tokenizer, and two texts.

By default the model is tiny and is made here, in seconds and without a download: its tokenizer and
its training text come from the documentation that every Python carries. With ``--model`` and
``--text`` an example runs on a real model and your own text.
"""

from __future__ import annotations

import argparse
import builtins
import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.cli.demo import text_halves

VOCABULARY, POSITIONS, LAYERS, WIDTH = 320, 128, 2, 64


@dataclass(frozen=True)
class Setting:
    """What an example works on.

    Attributes:
        model: dense.
        tokenizer: the model's own.
        learn: text to calibrate and train on.
        measure: other text, to measure on.
        window: tokens in a window: 32 for the tiny model, 512 for a real one.
        tokens: how many to train on, where an example trains.
        batch: sequences in a step of training.
        figure: where a figure is saved, if at all.
        real: whether the model is one that was asked for.
    """

    model: Any
    tokenizer: Any
    learn: str
    measure: str
    window: int
    tokens: int
    batch: int
    figure: Path | None
    real: bool

    def perplexity(self, model: PreTrainedModel) -> float:
        """Return a model's perplexity on 64 windows of 32 tokens, or 8 longer ones."""
        sizes = {"window": self.window, "windows": max(8, 2048 // self.window)}
        return tnlm.perplexity(model, self.measure, self.tokenizer, **sizes).perplexity

    def show(self, draw: Callable[..., Any], *values: Any, **labels: Any) -> None:
        """Draw into a figure, which a notebook shows; save it if that was asked for."""
        show(draw, *values, file=self.figure, **labels)


def show(draw: Callable[..., Any], *values: Any, file: Path | None = None, **labels: Any) -> None:
    """Draw into a figure, which a notebook shows; save it if there is a file."""
    if not importlib.util.find_spec("matplotlib"):
        print("for the figure: pip install 'tnlm[plot]'")
        return
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    draw(*values, axes, **labels)
    if file:
        figure.savefig(file)
        print(f"figure in {file}")


OPTIONS: dict[str, dict[str, Any]] = {
    "window": {"type": int, "help": "tokens in a window"},
    "figure": {"type": Path, "help": "where the figure is saved, e.g. figure.png"},
    "tokens": {"type": int, "help": "how many are trained on"},
}
"""Options that an example may have besides ``--model`` and ``--text``."""


def arguments(description: str | None, *options: str) -> argparse.Namespace:
    """Read the options that all examples share, and those of `OPTIONS` that are named."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a directory, a .gguf file or a hub id; tiny by default")
    parser.add_argument("--text", type=Path, help="a file to learn from and measure on")
    for option in options:
        parser.add_argument(f"--{option}", **OPTIONS[option])
    asked = parser.parse_args(words())
    if (asked.model is None) != (asked.text is None):
        parser.error("--model and --text go together")
    return asked


def words() -> list[str] | None:
    """Return what an example was given: nothing in a notebook, whose own arguments are others."""
    return [] if hasattr(builtins, "__IPYTHON__") else None


def setting(description: str | None, *options: str, kind: str = "llama") -> Setting:
    """Return the tiny model of a kind, ``"llama"`` or ``"gpt2"``, or the one that was asked for.

    Args:
        description: the example's docstring.
        options: what the example has besides ``--window`` and ``--figure``: ``"tokens"``.
        kind: of the tiny model.
    """
    asked = arguments(description, "window", "figure", *options)
    if asked.model is None:
        logging.disable_progress_bar()
        torch.set_num_threads(1)  # tiny matrices gain nothing from more
        learn, measure = (text[:40_000] for text in texts())
        model, tokenizer, window, tokens = make_model(kind), make_tokenizer(), 32, 16_384
    else:
        (model, tokenizer), window, tokens = load_model(asked.model), 512, 200_000
        text = asked.text.read_text()
        learn, measure = text[: len(text) // 2], text[len(text) // 2 :]
    return Setting(
        model,
        tokenizer,
        learn,
        measure,
        asked.window or window,
        getattr(asked, "tokens", None) or tokens,
        8 if asked.model is None else 2,
        asked.figure,
        asked.model is not None,
    )


@functools.cache
def texts() -> tuple[str, str]:
    """Return every other paragraph of Python's documentation to learn from, and the rest.

    Both are of the same kind, whatever topics this Python's documentation begins with.
    """
    paragraphs = "\n\n".join(text_halves()).split("\n\n")
    return "\n\n".join(paragraphs[::2]), "\n\n".join(paragraphs[1::2])


@functools.cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer whose words were learned from the text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([texts()[0]], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<s>",
        model_max_length=POSITIONS,
    )


def make_model(kind: str) -> Any:
    """Return a tiny model that has learned a little, so that compression has something to lose."""
    torch.manual_seed(0)
    ends: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    model: Any
    if kind == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=POSITIONS,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=4,
                initializer_range=0.1,
                **ends,
            )
        )
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                max_position_embeddings=POSITIONS,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=LAYERS,
                num_attention_heads=4,
                num_key_value_heads=2,
                initializer_range=0.1,
                **ends,
            )
        )
    model.loss_type = "ForCausalLM"  # cannot be derived from the name of GPT-2's class
    model.load_state_dict(_learned(kind, model))
    return model.eval()


_KNOWN: dict[str, dict[str, torch.Tensor]] = {}


def _learned(kind: str, model: Any, steps: int = 400) -> dict[str, torch.Tensor]:
    """Train a model on windows of 32 tokens for some seconds, once for all examples."""
    if kind not in _KNOWN:
        ids = torch.tensor(make_tokenizer()(texts()[0], verbose=False)["input_ids"])
        windows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(steps):
            batch = windows[torch.randint(len(windows), (16,))]
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            schedule.step()
        _KNOWN[kind] = {name: value.clone() for name, value in model.state_dict().items()}
    return _KNOWN[kind]
