"""The labels that a model must predict on a batch, and the loss whose gradients are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from tnlm.calibration.inputs import IGNORED, decodes, main_input
from tnlm.calibration.sequences import Batch
from tnlm.errors import CalibrationError, OptionError, did_you_mean

LABELS = ("sampled", "data")
"""Labels sampled from the model itself (true Fisher), or those of the data (empirical)."""

POSITIONS = 128
"""Number of positions sampled at once; each needs a float64 distribution over the vocabulary."""


_MEDIA_TOKENS = ("image_token_id", "video_token_id", "audio_token_id")
"""Names in configs of placeholder tokens for images, clips and audio; some use "index" for "id"."""


@dataclass(frozen=True)
class Task:
    """A batch with the labels to predict.

    Args:
        batch: the model's inputs.
        labels: the data's labels ``(sequences, length)``, ``IGNORED`` at positions without a
            prediction; for a classifier, the classes ``(sequences,)``. None to predict at all
            positions of the logits, with labels sampled from the model.
        draws: uniform random numbers in [0, 1), one per prediction, that sample labels from the
            model's distribution instead of the data's; None to use the labels.
        seed: seed of the samples if there are no labels.
        words: minimum number of classes.
    """

    batch: Batch
    labels: Tensor | None
    draws: Tensor | None = None
    seed: int = 0
    words: int = 2

    @property
    def predictions(self) -> int:
        """Number of labels to predict."""
        return 0 if self.labels is None else int((self.labels != IGNORED).sum())

    def loss(self, model: PreTrainedModel, output: Any) -> Tensor:
        """Return the cross-entropy of a model's output, summed over predictions, in float32.

        Raises:
            CalibrationError: if the output has no logits over the vocabulary or over classes, or
                the data has a class that the model does not.
        """
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[-1] < self.words:
            raise _no_head(model)
        labels, draws = self.labels, self.draws
        if labels is None:
            labels = torch.zeros(logits.shape[:-1], dtype=torch.int64)
            generator = torch.Generator().manual_seed(self.seed)
            draws = torch.rand(labels.numel(), generator=generator, dtype=torch.float64)
        if logits.shape[:-1] != labels.shape:
            raise _no_head(model)
        if int(labels.max()) >= logits.shape[-1]:
            raise CalibrationError(
                f"a label is {int(labels.max())}; the model has {logits.shape[-1]} classes"
            )
        flat, labels = logits.flatten(0, -2), labels.flatten().to(logits.device, copy=True)
        if draws is not None:
            labels[labels != IGNORED] = sample(flat.detach(), labels != IGNORED, draws)
        return F.cross_entropy(flat.float(), labels, ignore_index=IGNORED, reduction="sum")


def _no_head(model: PreTrainedModel) -> CalibrationError:
    return CalibrationError(
        f"gradients need a model with an output head over its vocabulary, or over classes, "
        f"but a {type(model).__name__} has none; load it with its head, or use a metric "
        "without gradients, such as metric='input'"
    )


def make_tasks(
    model: PreTrainedModel, batches: Sequence[Batch], labels: str = "sampled", seed: int = 0
) -> list[Task]:
    """Return what a model must predict on batches: next tokens, all tokens, or classes.

    A masked language model predicts all tokens; a classifier, the class of a text, an image or a
    clip; a token classifier, one class per token; a model of aligned audio, one class per frame. A
    decoder predicts its labels, or else the token after each token that it reads.

    Args:
        model: the model, whose class determines what it predicts.
        batches: token batches; padding and placeholder tokens of images and audio are neither
            predicted nor used for predictions.
        labels: ``"sampled"`` or ``"data"``.
        seed: seed of the samples, which do not depend on the batch size.

    Raises:
        OptionError: if ``labels`` is neither.
        CalibrationError: if a classifier must predict the data's labels and there are none, or the
            model predicts nothing of this kind.
    """
    if labels not in LABELS:
        raise OptionError(f"labels={labels!r}{did_you_mean(str(labels), LABELS)}")
    sampled = labels == "sampled"
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for number, batch in enumerate(batches):
        wanted, words = _wanted(model, batch, sampled)
        task = Task(batch, wanted, seed=seed + number, words=words)
        if sampled and wanted is not None:
            draws = torch.rand(task.predictions, generator=generator, dtype=torch.float64)
            task = replace(task, draws=draws)
        tasks.append(task)
    return tasks


def _wanted(model: PreTrainedModel, batch: Batch, sampled: bool) -> tuple[Tensor | None, int]:
    """Return what to predict on a batch, and the minimum number of classes."""
    if not sampled or not type(model).__name__.endswith(("ForCTC", "TokenClassification")):
        return labels_of(model, batch, sampled)
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if ids is None or mask is None:
        return None, 2
    return torch.zeros_like(ids).masked_fill(mask == 0, IGNORED), 2


def labels_of(model: PreTrainedModel, batch: Batch, sampled: bool = False) -> tuple[Tensor, int]:
    """Return the data's labels, and the minimum number of classes.

    Args:
        model: the model, whose class determines what it predicts.
        batch: as for :func:`make_tasks`.
        sampled: whether samples replace the labels, so that classes may be missing.

    Raises:
        CalibrationError: if there are no labels.
    """
    kind = type(model).__name__
    if kind.endswith(("ForCTC", "TokenClassification")):
        raise CalibrationError(
            f"the labels of a {kind} are not predicted one by one; use a metric that samples "
            "labels from the model, such as two-sided"
        )
    if kind.endswith("Classification"):
        return _classes(model, batch, sampled), 2
    words = getattr(model.config.get_text_config(decoder=True), "vocab_size", None)
    if words is None:
        raise _no_head(model)
    if decodes(model) and "labels" in batch:
        return batch["labels"], words
    if decodes(model) and "decoder_input_ids" in batch:
        ids, mask = batch["decoder_input_ids"], batch.get("decoder_attention_mask")
    elif "input_ids" in batch:
        ids, mask = batch["input_ids"], batch["attention_mask"]
    else:
        raise _no_head(model)
    causal = decodes(model) or model.can_generate()
    return _labels(model, ids, torch.ones_like(ids) if mask is None else mask, causal), words


def _classes(model: PreTrainedModel, batch: Batch, sampled: bool) -> Tensor:
    if not sampled and "labels" not in batch:
        raise CalibrationError(
            "a classifier's Fisher information needs the class of every sequence; give calibration "
            "data with 'labels'"
        )
    count = len(batch[main_input(model)])
    return batch.get("labels", torch.zeros(count, dtype=torch.int64))


def _labels(model: PreTrainedModel, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
    mask = mask.bool()
    shown = mask & ~torch.isin(ids, torch.tensor(media_tokens(model), dtype=ids.dtype))
    if not causal:
        return ids.masked_fill(~shown, IGNORED)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:].masked_fill(~(shown[:, 1:] & mask[:, :-1]), IGNORED)
    return labels


def media_tokens(model: PreTrainedModel) -> list[int]:
    """Return the placeholder tokens of images, clips or audio.

    Example:
        >>> from transformers import GPT2Config, GPT2Model
        >>> media_tokens(GPT2Model(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1)))
        []
    """
    names = [name.replace("_id", end) for name in _MEDIA_TOKENS for end in ("_id", "_index")]
    found = [getattr(model.config, name, None) for name in names]
    return [token for token in found if isinstance(token, int)]


def sample(logits: Tensor, chosen: Tensor, draws: Tensor) -> Tensor:
    """Sample a token from the distribution at each chosen position, by inverse transform.

    Args:
        logits: ``(positions, words)``.
        chosen: mask of the positions, ``(positions,)`` bool.
        draws: uniform random numbers in [0, 1), one per chosen position.

    Example:
        >>> sample(torch.zeros(3, 4), torch.tensor([True, False, True]), torch.tensor([0.1, 0.9]))
        tensor([0, 3])
    """
    found = []
    places = chosen.nonzero().flatten().split(POSITIONS)
    for at, uniform in zip(places, draws.to(logits.device).split(POSITIONS), strict=True):
        reached = logits[at].double().softmax(-1).cumsum(-1)
        level = uniform.double().unsqueeze(1) * reached[:, -1:]
        # The first word whose cumulative probability exceeds the draw; it never has probability 0.
        words = torch.searchsorted(reached, level, right=True).flatten()
        found.append(words.clamp_max(logits.shape[-1] - 1))
    return torch.cat(found)
