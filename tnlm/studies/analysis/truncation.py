"""truncate_groups: which singular values a model needs, and whether reconstruction tells."""

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

from tnlm.checks import check_model
from tnlm.errors import OptionError, did_you_mean
from tnlm.evaluation.number import finite
from tnlm.job import Data, prepare
from tnlm.modes import modes_kept
from tnlm.request import make_request
from tnlm.studies.analysis.group_scores import make_metric
from tnlm.studies.analysis.groups import Truncation, check_groups
from tnlm.targets import ALL_LINEAR, Selector, select

WEIGHTINGS = ("svd", "fwsvd")
"""Schemes whose singular values are cut: of the weights, or with columns weighed by Fisher."""


@dataclass(frozen=True)
class GroupRow:
    """What the model lost without one group of singular values in every target.

    Attributes:
        group: 1 for the largest singular values.
        error: Frobenius norm of what was cut from all targets, over that of all of them.
        weighted_error: the same in the norm that the weighting makes small.
        value: of the metric.
        loss: how much worse than the whole model's value that is.
    """

    group: int
    error: float
    weighted_error: float
    value: float
    loss: float


@dataclass(frozen=True)
class GroupTruncation:
    """The effect of every group of singular values, and whether errors foretell it.

    Attributes:
        rows: of all groups, that of the largest singular values first.
        weighting: ``"svd"`` or ``"fwsvd"``.
        dense: value of the metric for the whole model.
        spearman: rank correlation of ``error`` and ``loss`` over the groups, or None.
        weighted_spearman: of ``weighted_error`` and ``loss``.
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
            told = self.note if found is None else f"{found:.3f}"
            lines.append(f"rank correlation of {what} and loss: {told}")
        return "\n".join(lines)


def truncate_groups(
    model: PreTrainedModel,
    metric: Callable[[PreTrainedModel], float] | str | Path | Tensor | Sequence[Any],
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
    """Cut one group of singular values after another out of all targets, and measure the model.

    The singular values of every matrix are cut into equal groups. For each group the model is
    measured without it, in all targets at once. The weights are restored bit for bit, also on
    failure.

    Args:
        model: any Hugging Face model.
        metric: a function of the model; or text (a string, a path, a list of strings) or token ids
            whose perplexity is measured.
        weighting: ``"svd"``, or ``"fwsvd"`` for columns weighed by their Fisher information, which
            needs ``calibration``.
        groups: how many.
        tokenizer: turns texts into ids.
        targets: the matrices chosen, all linear ones if not given; see
            :func:`tnlm.targets.select`.
        ignore: matrices left alone, in the same words.
        higher_is_better: whether a function's larger values are better, as accuracies are.
        window: tokens in a window of the metric's text or ids.
        windows: such windows measured, from the start.
        calibration: data for the Fisher information.
        num_samples: windows drawn from it, at most.
        max_length: tokens in such a window.
        gradient_samples: how many of those drawn are used.
        seed: draws them.
        progress: show progress bars.

    Returns:
        A row for every group, and the rank correlation of reconstruction error and loss.

    Raises:
        OptionError: for an unknown weighting, or more groups than a matrix has singular values.
        EvaluationError: if the metric gives no finite number.

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
    measure = make_metric(model, metric, tokenizer, window, windows, higher_is_better)
    data = Data(calibration, tokenizer, num_samples, max_length, None, seed, gradient_samples)
    request = make_request(weighting, options={})
    check_model(model)
    check_groups(select(model, targets or ALL_LINEAR, ignore).targets, groups)  # before long work
    job = prepare(model, request, targets, ignore, data, progress)
    chosen = job.selection.targets
    with modes_kept(model):
        dense = finite(measure(model), "the metric of the whole model")
        with Truncation(model, chosen, job.metric, groups, progress=progress) as cut:
            values = []
            for group in tqdm(range(groups), desc="measuring", unit="group", disable=not progress):
                cut.drop(group)
                what = f"the metric of the model without group {group + 1}"
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
        note = "none: there is one group only"
    elif len(set(losses)) == 1:
        note = "none: the metric is the same without any group"
    found = [
        None if note else _spearman([getattr(row, name) for row in rows], losses)
        for name in ("error", "weighted_error")
    ]
    if not note and None in found:
        note = "none: all groups have the same error"
    return GroupTruncation(rows, weighting, dense, found[0], found[1], note)


def _spearman(errors: Sequence[float], losses: Sequence[float]) -> float | None:
    """Return the rank correlation of two lists, or None where one has no order."""
    if len(set(errors)) == 1 or len(set(losses)) == 1:
        return None
    return float(spearmanr(errors, losses).statistic)
