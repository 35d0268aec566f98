"""Distillation losses: one for each way to compare a student with its teacher.

Each is 0 if both agree, and is computed in float32 on the student's device, without padding.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor

from tnlm.errors import OptionError, did_you_mean

LOWEST = -1e4
"""Lower bound for log-probabilities: exp still gives 0, but inf - inf cannot occur."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of the terms of the loss; 0 leaves a term out.

    Attributes:
        logits: divergence of the predictions, at a temperature.
        hidden: error of the feed-forward outputs, averaged over layers.
        attention: divergence of the attention maps, averaged over layers.
        embedding: error of the embedded tokens, before positions are added.
        labels: cross-entropy with the data's labels.

    Raises:
        OptionError: if a weight is negative or not finite, or all are 0.
    """

    logits: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0
    embedding: float = 0.0
    labels: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in asdict(self).items():
            if not 0 <= weight < float("inf"):
                raise OptionError(f"{name}={weight!r}; allowed: a finite weight of at least 0")
        if not any(asdict(self).values()):
            raise OptionError(f"all weights are 0; give one of {', '.join(asdict(self))}")


PRESETS = {
    "logits": Weights(logits=1.0),
    # Edalati et al. 2022, arXiv 2110.08152, which does not publish its four weights.
    "ilkd": Weights(embedding=1.0, attention=1.0, hidden=1.0, labels=1.0),
}
"""Published choices of weights."""


def preset_weights(preset: str | None, **given: float | None) -> Weights:
    """Return the weights of a preset, overridden by those given.

    Example:
        >>> preset_weights("ilkd", labels=0.5, logits=None).labels
        0.5
    """
    name = "logits" if preset is None else preset
    if name not in PRESETS:
        raise OptionError(f"preset={name!r}{did_you_mean(str(name), PRESETS)}")
    known = {key: weight for key, weight in given.items() if weight is not None}
    return Weights(**(asdict(PRESETS[name]) | known))


def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 2.0
) -> Tensor:
    """Return T² KL(teacher || student) of predictions at temperature T, averaged over positions.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531.

    Args:
        student: logits ``(..., choices)``.
        teacher: logits of the same shape.
        mask: ``(...)``, 0 for padding; None to count all positions.
        temperature: T, by which the logits are divided.

    Example:
        >>> import torch
        >>> x = torch.tensor([[0.0, 1.0]])
        >>> float(logit_loss(x, x)), round(float(logit_loss(x, -x, temperature=1.0)), 3)
        (0.0, 0.462)
    """
    teacher = teacher.to(student.device)
    if mask is not None:
        kept = mask.to(student.device).bool()
        student, teacher = student[kept], teacher[kept]
    logs = [(x.float() / temperature).log_softmax(-1) for x in (student, teacher)]
    return temperature**2 * _divergence(*logs).mean()


def state_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return the mean squared error of hidden states, relative to the teacher's mean square.

    Args:
        student: ``(sequences, length, width)``.
        teacher: the same shape.
        mask: ``(sequences, length)``, 0 for padding.

    Example:
        >>> import torch
        >>> x = torch.ones(1, 2, 3)
        >>> float(state_loss(0.5 * x, x, torch.tensor([[1, 0]])))
        0.25
    """
    kept = mask.to(student.device).bool()
    wanted = teacher.to(student.device)[kept].float()
    error = student[kept].float() - wanted
    return error.square().mean() / wanted.square().mean().clamp_min(1e-30)


def map_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Return KL(teacher || student) of attention maps, averaged over heads and rows.

    Args:
        student: log-probabilities ``(sequences, heads, queries, keys)``.
        teacher: the same shape.
        mask: ``(sequences, queries)``, 0 for rows of padding, which do not count.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 4, 2, 2).log_softmax(-1)
        >>> float(map_loss(x, x, torch.ones(1, 2)))
        0.0
    """
    rows = _divergence(student.float(), teacher.to(student.device).float()).mean(1)
    return rows[mask.to(rows.device).bool()].mean()


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) over the last axis, from log-probabilities."""
    log_p, log_q = teacher.clamp_min(LOWEST), student.clamp_min(LOWEST)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
