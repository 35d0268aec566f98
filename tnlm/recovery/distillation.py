"""Distillation: trains a compressed model to match the original model."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.walk import eval_mode
from tnlm.errors import ModelError, OptionError
from tnlm.recovery.guard import GuardedTrainer
from tnlm.recovery.lessons import Weights, logit_loss, map_loss, preset_weights, state_loss
from tnlm.recovery.model_kinds import model_kind
from tnlm.recovery.traces import Trace, Traces, model_blocks
from tnlm.recovery.training import finetune
from tnlm.utils.undo import leaves_model

Pairs = Sequence[tuple[int, int]]
"""Pairs of a student's layer and the teacher's layer that it learns from."""


@leaves_model
def distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    data: Any,
    *,
    preset: str | None = None,
    logits: float | None = None,
    hidden: float | None = None,
    attention: float | None = None,
    embedding: float | None = None,
    labels: float | None = None,
    temperature: float = 2.0,
    layers: Pairs | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Train a student model in place to match its teacher.

    The loss is a weighted sum of terms, each of which is logged. Without a preset, the weight of
    ``logits`` is 1 and all others are 0. The teacher is not changed; it may have another precision
    or device.

    Args:
        student: the compressed model.
        teacher: usually the original model; with the same vocabulary or classes.
        data: see :func:`tnlm.recovery.training.finetune`.
        preset: ``"ilkd"`` for KnGPT2's intermediate-layer distillation: embedded tokens, attention
            maps, feed-forward outputs and labels. The paper's weights are not published: here each
            is 1, losses are means over layers instead of sums, and squared errors are relative.
        logits: weight of T² KL(teacher || student) of the predictions.
        hidden: weight of the squared error of feed-forward outputs, relative to the teacher's and
            averaged over layers (outputs of whole blocks if these have no feed-forward part).
        attention: weight of KL(teacher || student) of attention maps, averaged over layers.
        embedding: weight of the squared error of embedded tokens, relative to the teacher's, before
            positions are added.
        labels: weight of the model's own loss on the data.
        temperature: T of the logits.
        layers: pairs of a student's and a teacher's layer; by default, layers of the same index.
        **options: further arguments of :func:`tnlm.recovery.training.finetune`.

    Returns:
        The student.

    Raises:
        OptionError: if the models differ in vocabulary, classes, layers, heads or widths.
        ModelError: if a model does not expose what a term compares.
        TrainingError: as in ``finetune``.

    Source: logits, Hinton et al. 2015, arXiv 1503.02531; ``"ilkd"``, Edalati et al. 2022, arXiv
    2110.08152.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)
        >>> student, teacher = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
        >>> ids = torch.arange(64) % 9
        >>> distill(student, teacher, ids, max_length=16, progress=False) is student
        True
    """
    weights = preset_weights(
        preset,
        logits=logits,
        hidden=hidden,
        attention=attention,
        embedding=embedding,
        labels=labels,
    )
    if not 0 < temperature < float("inf"):
        raise OptionError(f"temperature={temperature!r}; allowed: a finite number above 0")
    make = functools.partial(
        Distiller,
        teacher=teacher,
        weights=weights,
        temperature=temperature,
        layers=pair_layers(student, teacher, weights, layers),
    )
    return finetune(student, data, trainer=make, **options)


class Distiller(GuardedTrainer):
    """Trains a model on a weighted sum of distillation losses.

    Args:
        teacher: see :func:`distill`.
        weights: weights of the terms.
        temperature: temperature of the logits.
        layers: pairs of layers for ``hidden`` and ``attention``.
        **arguments: passed to ``transformers.Trainer``.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        teacher: PreTrainedModel,
        weights: Weights,
        temperature: float = 2.0,
        layers: Pairs = (),
        **arguments: Any,
    ) -> None:
        """Prepare the comparison; see the class for the arguments."""
        super().__init__(**arguments)
        self._teacher, self._weights, self._temperature = teacher, weights, temperature
        self._layers = layers
        own: Any = self.model
        self._own = self._traces(own, [pair[0] for pair in layers])
        self._given = self._traces(teacher, [pair[1] for pair in layers])
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def _traces(self, model: PreTrainedModel, layers: Sequence[int]) -> Traces:
        weights = self._weights
        return Traces(
            model,
            embedding=weights.embedding > 0,
            hidden=layers if weights.hidden else (),
            maps=layers if weights.attention else (),
        )

    @property
    def settings(self) -> dict[str, Any]:
        """Further settings, as JSON values, that must match for a training to be resumed."""
        layers = [list(pair) for pair in self._layers]
        return {**asdict(self._weights), "temperature": self._temperature, "layers": layers}

    def train(self, *args: Any, **arguments: Any) -> Any:
        """Train, with the teacher in eval mode."""
        with self.attached():
            return super().train(*args, **arguments)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Attach hooks to both models, and remove them afterwards."""
        with self._own.attached(), self._given.attached(), eval_mode(self._teacher):
            yield

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of all terms on a batch."""
        output, terms = self.terms(model, inputs)
        weights = asdict(self._weights)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        for name, term in terms.items():
            self._sums[name] = self._sums.get(name, 0) + term.detach()
        self._count += 1
        return (loss, output) if return_outputs else loss

    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
        """Return the model's output on a batch, and every term whose weight is not 0."""
        asked = dict(inputs) if self._weights.labels else {**inputs, "labels": None}
        with self._own.recording() as own:
            output = model(**asked)
        shown = {k: v.to(self._teacher.device) for k, v in inputs.items() if k != "labels"}
        with torch.no_grad(), self._given.recording() as given:
            wanted = self._teacher(**shown).logits
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        terms = self._compared(own, given, mask)
        if self._weights.logits:
            at = mask if output.logits.dim() == 3 else None
            terms["logits"] = logit_loss(output.logits, wanted, at, self._temperature)
        if self._weights.labels:
            terms["labels"] = output.loss
        return output, terms

    def _compared(self, own: Trace, given: Trace, mask: Tensor) -> dict[str, Tensor]:
        """Return the terms that compare intermediate states."""
        terms = {}
        if own.embedding is not None and given.embedding is not None:
            terms["embedding"] = state_loss(own.embedding, given.embedding, mask)
        if self._weights.hidden:
            pairs = [(own.hidden[i], given.hidden[j]) for i, j in self._layers]
            terms["hidden"] = torch.stack([state_loss(*pair, mask) for pair in pairs]).mean()
        if self._weights.attention:
            maps = [(own.maps.get(i), given.maps.get(j)) for i, j in self._layers]
            seen = [map_loss(a, b, mask) for a, b in maps if a is not None and b is not None]
            if len(seen) < len(maps):
                raise ModelError("a layer has no attention map; leave it out of layers=")
            terms["attention"] = torch.stack(seen).mean()
        return terms

    def log(self, logs: dict[str, float], *args: Any, **arguments: Any) -> None:
        """Log, with the mean of every term since the last log."""
        if self._count and "loss" in logs:
            logs = logs | {name: float(total) / self._count for name, total in self._sums.items()}
            self._sums, self._count = {}, 0
        super().log(logs, *args, **arguments)


def pair_layers(
    student: PreTrainedModel, teacher: PreTrainedModel, weights: Weights, layers: Pairs | None
) -> Pairs:
    """Return the pairs of layers to compare.

    Raises:
        OptionError: if the models cannot be compared, as in :func:`distill`.
    """
    if student is teacher:
        raise OptionError("the student is its own teacher; copy the model before compressing it")
    own, given = student.config.get_text_config(), teacher.config.get_text_config()
    kinds = [model_kind(model) for model in (student, teacher)]
    if kinds[0] != kinds[1]:
        raise OptionError(
            f"a {type(student).__name__} cannot learn from a {type(teacher).__name__}; load both "
            "for the same task"
        )
    same = ["vocab_size"]
    if kinds[0] == "classes":
        same.append("num_labels")
    if weights.hidden or weights.embedding:
        same.append("hidden_size")
    if weights.attention:
        same.append("num_attention_heads")
    for name in same:
        if getattr(own, name) != getattr(given, name):
            raise OptionError(
                f"the student has {name}={getattr(own, name)} and the teacher "
                f"{name}={getattr(given, name)}, but they must agree for these terms"
            )
    if not (weights.hidden or weights.attention):
        if layers is not None:
            raise OptionError("layers= pairs layers for hidden= or attention=; give one of these")
        return ()
    depth, other = len(model_blocks(student)), len(model_blocks(teacher))
    if layers is None and depth != other:
        raise OptionError(
            f"the student has {depth} layers and the teacher {other}; give pairs in "
            "layers=[(student layer, teacher layer), ...]"
        )
    pairs = [(index, index) for index in range(depth)] if layers is None else list(layers)
    if not pairs or any(not (0 <= i < depth and 0 <= j < other) for i, j in pairs):
        raise OptionError(
            f"layers={pairs}; allowed: pairs from (0, 0) to ({depth - 1}, {other - 1})"
        )
    return pairs
