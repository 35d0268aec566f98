"""truncate_groups: which singular values a model needs, and whether their size predicts it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.compression.choices import Calibration
from tnlm.compression.job import prepare
from tnlm.compression.request import make_request
from tnlm.errors import OptionError, did_you_mean
from tnlm.evaluation.number import finite
from tnlm.studies.analysis.group_scores import make_score
from tnlm.studies.analysis.groups import Truncation, check_groups
from tnlm.targets.base import Selector
from tnlm.targets.checks import check_model
from tnlm.targets.matching import ALL_LINEAR
from tnlm.targets.selection import select
from tnlm.utils.training_flags import modes_kept

WEIGHTINGS = ("svd", "fwsvd")
"""Schemes: singular values of the weights, or of weights with Fisher-weighted columns."""


@dataclass(frozen=True)
class GroupRow:
    """The effect of removing one group of singular values from every target.

    Attributes:
        group: 1 for the group of the largest singular values.
        error: relative error of all targets together, in the Frobenius norm.
        weighted_error: the same in the norm that the weighting minimizes.
        value: score without the group.
        loss: how much worse that is than the score of the whole model.
    """

    group: int
    error: float
    weighted_error: float
    value: float
    loss: float


@dataclass(frozen=True)
class GroupTruncation:
    """The effect of every group of singular values, and whether errors predict it.

    Attributes:
        rows: one per group, starting with the largest singular values.
        weighting: ``"svd"`` or ``"fwsvd"``.
        dense: score of the whole model.
        spearman: rank correlation of ``error`` and ``loss`` over the groups, or None.
        weighted_spearman: rank correlation of ``weighted_error`` and ``loss``, or None.
        note: why there is no correlation, or empty.
    """

    rows: tuple[GroupRow, ...]
    weighting: str
    dense: float
    spearman: float | None
    weighted_spearman: float | None
    note: str = ""

    def to_json(self) -> str:
        """Return everything as JSON text."""
        return json.dumps(asdict(self), indent=1, allow_nan=False)

    def __str__(self) -> str:
        """Return a table of the groups, and the correlations."""
        lines = [f"{'group':>5}  {'error':>8}  {'weighted':>8}  {'value':>10}  {'loss':>10}"]
        lines += [
            f"{row.group:>5}  {row.error:>8.4f}  {row.weighted_error:>8.4f}  "
            f"{row.value:>10.5g}  {row.loss:>10.4g}"
            for row in self.rows
        ]
        lines.append(f"{self.weighting}; the whole model's value is {self.dense:.5g}")
        for what, found in (("error", self.spearman), ("weighted", self.weighted_spearman)):
            shown = self.note if found is None else f"{found:.3f}"
            lines.append(f"rank correlation of {what} and loss: {shown}")
        return "\n".join(lines)


def truncate_groups(
    model: PreTrainedModel,
    score: Callable[[PreTrainedModel], float] | str | Path | Tensor | Sequence[Any],
    *,
    weighting: str = "svd",
    groups: int = 10,
    tokenizer: Any = None,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    higher_is_better: bool = False,
    window: int = 512,
    windows: int = 16,
    calibration: Any = None,
    num_samples: int = 64,
    max_length: int = 512,
    gradient_samples: int = 16,
    seed: int = 0,
    progress: bool = True,
) -> GroupTruncation:
    """Score a model without each group of singular values in turn.

    The singular values of every matrix are split into equal groups, and each group is removed from
    all targets at once. The weights are restored exactly, also on failure.

    Args:
        model: any Hugging Face model.
        score: a function of the model; or text (a string, a path, a list of strings) or token ids,
            for the perplexity on them.
        weighting: ``"svd"``; or ``"fwsvd"``, which weights columns by their Fisher information and
            needs ``calibration``.
        groups: number of groups.
        tokenizer: turns texts into ids.
        targets: the matrices chosen, all linear ones if not given; see
            :func:`tnlm.targets.selection.select`.
        ignore: matrices left alone, in the same form.
        higher_is_better: whether higher values of a function are better, as for accuracies.
        window: tokens per window of the score's text or ids.
        windows: how many such windows to measure, from the start.
        calibration: data for the Fisher information.
        num_samples: largest number of windows drawn from it.
        max_length: tokens per such window.
        gradient_samples: how many of these windows are used for gradients.
        seed: draws the windows.
        progress: show progress bars.

    Returns:
        One row per group, and the rank correlation of reconstruction error and loss.

    Raises:
        OptionError: if the weighting is unknown, or a matrix has fewer singular values than groups.
        EvaluationError: if the score is not a finite number.

    Source: FWSVD, Hsu et al. 2022, arXiv 2207.00112.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> up = model.model.layers[0].mlp.up_proj
        >>> found = truncate_groups(model, lambda m: up.weight.detach().square().sum(), groups=4,
        ...                         higher_is_better=True, progress=False)
        >>> len(found.rows), found.rows[0].error > found.rows[3].error, found.spearman
        (4, True, 1.0)
    """
    if weighting not in WEIGHTINGS:
        raise OptionError(f"weighting={weighting!r}{did_you_mean(str(weighting), WEIGHTINGS)}")
    measure = make_score(model, score, tokenizer, window, windows, higher_is_better)
    request = make_request(weighting)
    data = Calibration(calibration)
    if request.looks_at_data:
        data = Calibration(
            calibration,
            tokenizer,
            num_samples=num_samples,
            max_length=max_length,
            gradient_samples=gradient_samples,
            seed=seed,
        )
    check_model(model)
    check_groups(select(model, targets or ALL_LINEAR, ignore).targets, groups)  # before long work
    job = prepare(model, request, targets, ignore, data, progress)
    chosen = job.selection.targets
    with modes_kept(model):
        dense = finite(measure(model), "the score of the whole model")
        with Truncation(model, chosen, job.evidence.metric, groups, progress=progress) as cut:
            values = []
            for group in tqdm(range(groups), desc="measuring", unit="group", disable=not progress):
                cut.drop(group)
                what = f"the score of the model without group {group + 1}"
                values.append(finite(measure(model), what))
    sign = -1.0 if higher_is_better else 1.0
    errors, weighted = (_relative(energy) for energy in (cut.energy, cut.weighted))
    rows = tuple(
        GroupRow(group + 1, errors[group], weighted[group], value, sign * (value - dense))
        for group, value in enumerate(values)
    )
    return _correlated(rows, weighting, dense)


def _relative(energy: Tensor) -> list[float]:
    total = float(energy.sum())
    found: list[float] = (energy / (total or 1.0)).sqrt().tolist()
    return found


def _correlated(rows: tuple[GroupRow, ...], weighting: str, dense: float) -> GroupTruncation:
    losses = [row.loss for row in rows]
    note = ""
    if len(rows) < 2:
        note = "none: there is only one group"
    elif len(set(losses)) == 1:
        note = "none: the score is the same whichever group is removed"
    found = [
        None if note else _spearman([getattr(row, name) for row in rows], losses)
        for name in ("error", "weighted_error")
    ]
    if not note and None in found:
        note = "none: all groups have the same error"
    return GroupTruncation(rows, weighting, dense, found[0], found[1], note)


def _spearman(errors: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the rank correlation of two lists, or None if all values of one are equal."""
    if len(set(errors)) == 1 or len(set(losses)) == 1:
        return None
    return float(spearmanr(errors, losses).statistic)
