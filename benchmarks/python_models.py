"""Train small language models on the text that Python ships; resumable.

The vocabulary is a byte-level BPE of 2,048 tokens. AdamW at 3e-3 with a warm-up and a linear decay,
batches of 8 windows of 256 tokens. A model's folder is an ordinary transformers checkpoint, with
`training.jsonl` and `held_out.jsonl` beside it. Its name has a digest of the model's configuration
and of how it is trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from python_text import PythonText, python_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as FastTokenizer

STEPS, BATCH, WINDOW = 1000, 8, 256
RATE, DECAY, WARMUP, CLIP = 3e-3, 0.1, 50, 1.0
VOCABULARY, END = 2048, "<end>"
SAVED = 100
"""Steps after which training can be resumed."""
PARTIAL, LOSS = "partial.pt", "training_loss.json"


def trained(
    name: str, make: Callable[[], PreTrainedModel], steps: int, **asked: Any
) -> tuple[Any, Any, Path]:
    """Return a model, its tokenizer and their folder in tnlm's cache; train it if it is not there.

    Args:
        name: start of the folder's name.
        make: draws the untrained model.
        steps: of training.
        asked: further arguments of every forward pass in training.
    """
    text, fresh = python_text(), make()
    home = Path(os.environ.get("TNLM_HOME", "~/.cache/tnlm")).expanduser()
    made = _digest(fresh, asked)
    folder = home / "benchmarks" / f"{name}-{steps}-{text.digest}-{made}"
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = make_tokenizer(text.training)
        model = train(fresh, token_windows(tokenizer, text.training), steps, folder, **asked)
        write_text(text, folder)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)  # last: its config says that all is there
        (folder / PARTIAL).unlink(missing_ok=True)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), folder


def _digest(model: PreTrainedModel, asked: dict[str, Any]) -> str:
    """Return a digest of an untrained model's configuration, and of how it is trained."""
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)
    training = [BATCH, WINDOW, RATE, DECAY, WARMUP, CLIP, VOCABULARY, asked]
    known = json.dumps([config, training], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:8]


def make_tokenizer(pieces: list[str]) -> FastTokenizer:
    """Learn a byte-level BPE vocabulary."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learned.train_from_iterator(pieces, trainer)
    return FastTokenizer(tokenizer_object=learned, eos_token=END, pad_token=END)


def token_windows(tokenizer: FastTokenizer, pieces: list[str]) -> Tensor:
    """Return all tokens, pieces apart by the end token, as ``(windows, tokens)``."""
    rows = tokenizer(pieces)["input_ids"]
    tokens = [token for row in rows for token in (*row, tokenizer.eos_token_id)]
    count = len(tokens) // WINDOW
    return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)


def train(model: Any, windows: Tensor, steps: int, folder: Path, **asked: Any) -> Any:
    """Train a model in place, from where the last attempt stopped."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / WARMUP) * (1 - step / steps)
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    losses = _resume(parts, folder / PARTIAL)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    model.train()
    for step in tqdm(range(len(losses), steps), initial=len(losses), total=steps):
        chosen = windows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]]
        found = model(input_ids=chosen, labels=chosen, **asked)
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(round(float(found.loss.detach()), 4))
        if (step + 1) % SAVED == 0:
            _save(parts, losses, folder / PARTIAL)
    (folder / LOSS).write_text(json.dumps(losses) + "\n")
    return model.eval()


def _resume(parts: dict[str, Any], path: Path) -> list[float]:
    if not path.exists():
        return []
    held = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(held[name])
    losses: list[float] = held["losses"]
    return losses


def _save(parts: dict[str, Any], losses: list[float], path: Path) -> None:
    new = path.with_suffix(".new")
    torch.save({"losses": losses, **{name: part.state_dict() for name, part in parts.items()}}, new)
    new.replace(path)


def write_text(text: PythonText, folder: Path) -> None:
    """Write both parts as JSONL files."""
    for name in ("training", "held_out"):
        rows = (json.dumps({"text": piece}) for piece in getattr(text, name))
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
