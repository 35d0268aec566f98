"""Fine-tuning: trains a compressed model on data, like any other model."""

from __future__ import annotations

import contextlib
import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from tnlm.calibration.caching import caches_kept
from tnlm.calibration.data import fingerprint
from tnlm.calibration.text import AUTO
from tnlm.errors import CheckpointError, OptionError, did_you_mean
from tnlm.layers.made import made_layers
from tnlm.recovery.examples import Examples, batches, collate
from tnlm.recovery.guard import GuardedTrainer
from tnlm.recovery.model_kinds import examples_for, padding_for
from tnlm.utils.claim import temporary_folder
from tnlm.utils.training_flags import modes_kept
from tnlm.utils.undo import leaves_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNING_RATE = 5e-5
SETTINGS = "tnlm_training.json"
"""File beside the checkpoints that identifies their training."""

TRAIN = ("all", "factors")
WRAPPED = ("forward", "_original_forward")
"""Attributes that accelerate sets on a model in mixed precision."""


@leaves_model
def finetune(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: int | None = 200_000,
    epochs: float = 1,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 8,
    max_length: int = 512,
    text: str = "text",
    label: str = "label",
    bos: bool | str = AUTO,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    train: str | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    trainer: Callable[..., GuardedTrainer] = GuardedTrainer,
    **arguments: Any,
) -> PreTrainedModel:
    """Train a model in place, on its own loss, with ``transformers.Trainer``.

    A model on the CPU is trained there, and otherwise on a GPU. Causal models learn to predict the
    next token, masked models 15 % hidden tokens, sequence classifiers the data's classes. Weights
    in float32 train best, since half precision rounds small updates away (``bf16=True`` is fast and
    does not).

    Args:
        model: compressed or not; possibly with PEFT adapters.
        data: texts, a file, ids, or labelled rows: see `tnlm.recovery.examples.training_set`.
        tokenizer: needed for text.
        tokens: most tokens of the data to use, drawn at random; None for all.
        epochs: number of passes over them.
        learning_rate: peak learning rate of AdamW; it falls linearly to 0.
        batch_size: sequences per step.
        max_length: tokens per sequence.
        text: name of the rows' text column.
        label: name of the rows' class column, for classifiers.
        bos: whether a window of text starts with BOS: True, False, or ``"auto"`` to follow the
            tokenizer.
        warmup: fraction of the steps in which the learning rate rises.
        weight_decay: weight decay of AdamW.
        train: ``"all"`` parameters, or only the ``"factors"`` of compressed layers; None trains
            the parameters that require a gradient, as with adapters.
        output_dir: where to save a checkpoint every tenth of the steps; None saves none.
        resume: continue from the last checkpoint of the same training; False starts a new one.
        seed: seed of everything random.
        progress: show a progress bar.
        callbacks: callbacks for the Trainer.
        trainer: makes the Trainer, for another loss.
        **arguments: arguments of ``transformers.TrainingArguments``, which override the above.

    Returns:
        The model.

    Raises:
        TrainingError: if the data cannot be used, or a loss is not finite; the parameters are then
            the last saved ones with a finite loss.
        OptionError: if an argument is unknown, or nothing would be trained.
        CheckpointError: if ``output_dir`` has checkpoints of another training.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> ids = torch.arange(64) % 9
        >>> finetune(model, ids, max_length=16, progress=False) is model
        True
    """
    examples = examples_for(
        model,
        data,
        tokenizer,
        max_length=max_length,
        text=text,
        label=label,
        max_tokens=tokens,
        seed=seed,
        bos=bos,
    )
    _check_positive(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size)
    if not 0 <= warmup < 1:
        raise OptionError(f"warmup={warmup!r}; allowed: a fraction of the steps, in [0, 1)")
    padding = padding_for(model, tokenizer, batch_size)
    options = {
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": batch_size,
        # The first step of a warm-up has a learning rate of 0: a single step would do nothing.
        "warmup_steps": warmup if len(examples) * epochs > batch_size else 0,
        "weight_decay": weight_decay,
        "seed": seed,
    } | arguments
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # the caller may be in inference mode
        stack.enter_context(_own_randomness(model.device))
        stack.enter_context(_restored(model))
        _choose(model, train)
        folder = output_dir or stack.enter_context(temporary_folder())
        made = trainer(
            model=model,
            args=_training_arguments(model, folder, output_dir is not None, progress, options),
            train_dataset=examples,
            data_collator=functools.partial(collate, pad=padding),
            callbacks=list(callbacks),
        )
        checkpoint = None
        if output_dir is not None:
            settings = {**options, **made.settings, "train": train, "data": _name(examples)}
            checkpoint = _open(Path(output_dir), settings, resume)
        made.train(resume_from_checkpoint=checkpoint)
    return model


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise OptionError(f"{name}={value!r}; allowed: a finite number above 0", argument=name)


def _training_arguments(
    model: PreTrainedModel,
    folder: str | Path,
    save: bool,
    progress: bool,
    options: dict[str, Any],
) -> TrainingArguments:
    cpu = model.device.type == "cpu"
    default: dict[str, Any] = {
        "output_dir": str(folder),
        "save_strategy": "steps" if save else "no",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "logging_steps": 0.05,
        "report_to": [],
        "disable_tqdm": not progress,
        "remove_unused_columns": False,
        "use_cpu": cpu,
        "dataloader_pin_memory": not cpu,
    }
    allowed = {field.name for field in fields(TrainingArguments) if field.init}
    for name in options:
        if name not in allowed:
            raise OptionError(f"unknown argument {name!r}{did_you_mean(name, allowed)}")
    try:
        made = TrainingArguments(**(default | options))
    except (ValueError, TypeError) as err:
        raise OptionError(f"TrainingArguments rejects the options: {err}") from err
    if made.n_gpu > 1:
        made._n_gpu = 1  # otherwise copies of the model would be trained, without its hooks
    return made


def _choose(model: nn.Module, train: str | None) -> None:
    """Make exactly the chosen parameters require a gradient."""
    if train is not None and train not in TRAIN:
        raise OptionError(f"train={train!r}{did_you_mean(str(train), TRAIN)}")
    if train is not None:
        chosen = {id(p) for p in (model.parameters() if train == "all" else _factors(model))}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen and parameter.is_floating_point())
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise OptionError(
            f"train={train!r} leaves no parameter of {type(model).__name__} to train; use "
            "train='all'"
        )


def _factors(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the fitted parameters: factors, and weights of narrowed layers, without biases."""
    for made in made_layers(model):
        if made.approximated:
            for name, parameter in made.module.named_parameters():
                if name.rpartition(".")[2] != "bias":
                    yield parameter


def _name(examples: Examples) -> str:
    """Return a hash of the examples."""
    return fingerprint(batches(examples, batch_size=1))


def _open(folder: Path, settings: dict[str, Any], resume: bool) -> str | None:
    """Return the last checkpoint of a training with these settings, or None if there is none."""
    # The state is written last, so a checkpoint without it is incomplete.
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    file, wanted = folder / SETTINGS, json.loads(json.dumps(settings, default=str))
    if found and not resume:
        raise CheckpointError(
            f"{folder} already has checkpoints; use resume=True to continue, or another output_dir"
        )
    if found:
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        changed = [k for k in {**before, **wanted} if before.get(k) != wanted.get(k)]
        if changed:
            raise CheckpointError(
                f"{folder} has checkpoints of another training, which differs in "
                f"{', '.join(sorted(changed))}; use the same settings, or another output_dir"
            )
        return str(max(found, key=lambda path: int(path.name.rpartition("-")[2])))
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(wanted, indent=1), encoding="utf-8")
    return None


@contextlib.contextmanager
def _own_randomness(device: torch.device) -> Iterator[None]:
    """Restore the generators of random, NumPy and PyTorch, which a Trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what Trainer seeds
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextlib.contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore everything but the values of the parameters."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    wrapped = {name: vars(model)[name] for name in WRAPPED if name in vars(model)}
    checkpointing = model.is_activation_checkpointing
    try:
        with modes_kept(model), caches_kept(model):
            yield
    finally:
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)
            parameter.grad = None
        for name in WRAPPED:
            vars(model).pop(name, None)
        vars(model).update(wrapped)
        if not checkpointing:
            model.activation_checkpointing_disable()
