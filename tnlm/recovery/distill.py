"""Distillation: a compressed model learns to do what the dense one does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.walk import eval_mode
from tnlm.errors import ModelError, OptionError, did_you_mean
from tnlm.feed_forward import readers
from tnlm.recovery import lessons
from tnlm.recovery.examples import examples
from tnlm.recovery.training import LEARNING_RATE, SteadyTrainer, enough, run, trainable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Weights:
    """How much each term of the loss counts; 0 leaves it out.

    Attributes:
        logits: Kullback-Leibler divergence of the student's predictions from the teacher's.
        hidden: squared error of every feed-forward output, relative to the teacher's size.
        attention: divergence of every head's attention maps.
        embedding: squared error of what enters the first block.
        labels: cross-entropy on the data.
    """

    logits: float = 1.0
    hidden: float = 0.0
    attention: float = 0.0
    embedding: float = 0.0
    labels: float = 0.0


PRESETS: Mapping[str, Weights] = {
    "logits": Weights(),
    # KnGPT2's intermediate-layer distillation; the paper does not give its four weights.
    "ilkd": Weights(logits=0.0, hidden=1.0, attention=1.0, embedding=1.0, labels=1.0),
}


class Distiller(SteadyTrainer):
    """A Trainer whose loss is a sum of distances from a teacher.

    Args:
        teacher: a model with the same outputs; never trained.
        weights: of the terms.
        temperature: softens both models' predictions.
        feed_forward: names of the modules whose outputs are the feed-forward outputs.
        **arguments: a Trainer's.
    """

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        weights: Weights,
        temperature: float = 2.0,
        feed_forward: Sequence[str] = (),
        **arguments: Any,
    ) -> None:
        """Hold the teacher; see the class for the arguments."""
        super().__init__(**arguments)
        self.teacher, self.weights, self.temperature = teacher, weights, temperature
        self.feed_forward = feed_forward

    def terms(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weighted terms that count."""
        weights, seen = self.weights, inputs["attention_mask"].bool()
        ours, ours_hidden = self._run(model, inputs)
        with torch.no_grad():
            teacher = self.teacher
            theirs, theirs_hidden = self._run(
                teacher, {key: value.to(teacher.device) for key, value in inputs.items()}
            )
        found = {}
        if weights.logits:
            found["logits"] = lessons.logits(ours.logits, theirs.logits, seen, self.temperature)
        if weights.hidden:
            found["hidden"] = lessons.outputs(ours_hidden, theirs_hidden, seen)
        if weights.attention:
            found["attention"] = lessons.maps(ours.attentions, theirs.attentions, seen)
        if weights.embedding:
            found["embedding"] = lessons.outputs(
                ours.hidden_states[:1], theirs.hidden_states[:1], seen
            )
        if weights.labels:
            found["labels"] = ours.loss
        return {name: getattr(weights, name) * value for name, value in found.items()}

    def _run(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
        """Run a model, and collect what its feed-forward layers give."""
        hidden: list[Tensor] = []
        names = self.feed_forward if self.weights.hidden else ()
        hooks = [
            model.get_submodule(name).register_forward_hook(lambda *call: hidden.append(call[2]))
            for name in names
        ]
        try:
            output = model(
                **inputs,
                output_attentions=self.weights.attention > 0,
                output_hidden_states=self.weights.embedding > 0,
            )
        finally:
            for hook in hooks:
                hook.remove()
        return output, hidden


def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    preset: str = "logits",
    temperature: float = 2.0,
    tokens: int = 200_000,
    epochs: float | None = None,
    learning_rate: float = LEARNING_RATE,
    batch_size: int = 8,
    max_length: int = 512,
    train: str = "all",
    output_dir: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
    weights: Mapping[str, float] | None = None,
    **arguments: Any,
) -> PreTrainedModel:
    """Train a student in place to do what a teacher does, and return it.

    Args:
        student: causal or masked language model, or classifier.
        teacher: of the same kind and vocabulary; it may be of lower precision or elsewhere.
        data: as for :func:`tnlm.recovery.training.finetune`.
        tokenizer: needed for texts, and for masked language models.
        preset: ``"logits"``, or ``"ilkd"``: KnGPT2's intermediate layers, attention maps,
            embeddings and cross-entropy, all of weight 1 as the paper gives none.
        temperature: softens both models' predictions.
        tokens: tokens the student is trained on.
        epochs: instead of ``tokens``, how often it sees all data.
        learning_rate: of AdamW, at its highest.
        batch_size: examples in a step.
        max_length: tokens of an example.
        train: ``"all"`` parameters, or ``"factors"``: only those of layers that tnlm made.
        output_dir: keeps checkpoints, from which an interrupted run goes on to the same result.
        seed: of the order of examples.
        progress: show a progress bar.
        weights: in the place of a preset, by the names of :class:`Weights`.
        **arguments: more of `transformers.TrainingArguments`.

    Raises:
        OptionError: for an unknown preset or term, or a temperature not above 0.
        ModelError: if the two models do not predict the same, or have other layers or heads.
        TrainingError: if the loss stops being finite; the student keeps the last good weights.

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531; ILKD: KnGPT2, Edalati et al. 2022,
    arXiv 2110.08152.
    """
    counted = _weights(preset, weights)
    if not temperature > 0:
        raise OptionError(f"temperature={temperature!r}; allowed: above 0")
    _check(student, teacher, counted)
    names = _feed_forward(teacher) if counted.hidden else []
    most = enough(tokens, epochs, max_length)
    found = examples(student, data, tokenizer, max_length=max_length, most=most, seed=seed)
    with trainable(student, train), _eager(student, teacher, counted), eval_mode(teacher):
        run(
            Distiller,
            student,
            found,
            tokens=tokens,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            output_dir=output_dir,
            seed=seed,
            progress=progress,
            extra={
                "teacher": teacher,
                "weights": counted,
                "temperature": temperature,
                "feed_forward": names,
            },
            **arguments,
        )
    return student


def _weights(preset: str, weights: Mapping[str, float] | None) -> Weights:
    if preset not in PRESETS:
        raise OptionError(f"preset={preset!r}{did_you_mean(str(preset), PRESETS)}")
    if weights is None:
        return PRESETS[preset]
    known = vars(Weights())
    for name, value in weights.items():
        if name not in known:
            raise OptionError(f"unknown term {name!r}{did_you_mean(name, known)}")
        if not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise OptionError(f"{name}={value!r}; allowed: a finite number >= 0")
    chosen = Weights(**{name: weights.get(name, 0.0) for name in known})
    if not any(vars(chosen).values()):
        raise OptionError("every term has weight 0: nothing is to be learnt")
    return chosen


def _check(student: PreTrainedModel, teacher: PreTrainedModel, weights: Weights) -> None:
    ours, theirs = (m.config.get_text_config() for m in (student, teacher))
    asked = {"vocab_size": True, "num_hidden_layers": bool(weights.hidden or weights.attention)}
    asked |= {"num_attention_heads": bool(weights.attention)}
    asked |= {"hidden_size": bool(weights.hidden or weights.embedding)}
    for name, needed in asked.items():
        pair = getattr(ours, name, None), getattr(theirs, name, None)
        if needed and pair[0] != pair[1]:
            raise ModelError(f"the student's {name} is {pair[0]}, the teacher's {pair[1]}")
    classes = [
        model.config.num_labels if _classifies(model) else None for model in (student, teacher)
    ]
    if classes[0] != classes[1]:
        raise ModelError(f"the student has {classes[0]} classes, the teacher {classes[1]}")


def _classifies(model: PreTrainedModel) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _feed_forward(teacher: PreTrainedModel) -> list[str]:
    found = readers(teacher)
    if not found:
        raise ModelError(f"no feed-forward layers are known in a {type(teacher).__name__}")
    return found


@contextlib.contextmanager
def _eager(student: PreTrainedModel, teacher: PreTrainedModel, weights: Weights) -> Iterator[None]:
    """Let attention return its maps, which fused kernels do not compute; undone after."""
    kernels = [(m, m.config._attn_implementation) for m in (student, teacher)]
    try:
        if weights.attention:
            for model, _ in kernels:
                model.set_attn_implementation("eager")
        yield
    finally:
        for model, kernel in kernels:
            if model.config._attn_implementation != kernel:
                model.set_attn_implementation(kernel)
