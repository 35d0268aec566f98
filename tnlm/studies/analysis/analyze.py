"""analyze: the structure of every matrix of a model, one matrix at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.api import to_dense
from tnlm.calibration.capacity import check_batches
from tnlm.calibration.data import begins, count_tokens, token_batches
from tnlm.calibration.statistics import collect
from tnlm.calibration.store import Statistics
from tnlm.calibration.text import AUTO
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Format
from tnlm.errors import OptionError
from tnlm.metrics.metric import InputMoment, Metric
from tnlm.studies.analysis.curves import CurveRow, curve_rows
from tnlm.studies.analysis.features import FeatureRow, feature_rows
from tnlm.studies.analysis.result import Analysis
from tnlm.studies.analysis.weights import WeightRow, weight_row
from tnlm.targets.base import Selector, Target
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.matching import ALL_LINEAR
from tnlm.targets.selection import select
from tnlm.utils.memory import release

EMBEDDING = "features: an embedding has no inputs to measure"
UNSEEN = "features: the calibration data gave it no inputs"
MEASURED = ("moment", "mean", "count")
"""Statistics of the inputs of a matrix."""


def analyze(
    model: PreTrainedModel,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    formats: Sequence[str] = (),
    num_samples: int = 16,
    max_length: int = 512,
    bos: bool | str = AUTO,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """Describe the weights of a model's matrices, their outputs on data, and errors of formats.

    Only singular values and eigenvalues are computed, for one matrix at a time. The model is left
    unchanged.

    Args:
        model: any Hugging Face model, not quantized. Of a compressed one, the matrices that its
            factors stand for are analyzed, in a dense copy.
        calibration: texts, a file, token ids or a dataset, on which outputs are measured; see
            :func:`tnlm.calibration.data.token_batches`.
        tokenizer: turns texts into ids.
        targets: the matrices to analyze, all linear ones if not given; see
            :func:`tnlm.targets.selection.select`.
        ignore: matrices left alone, in the same form.
        formats: names of formats to compute errors for at many sizes: in the Frobenius norm, and
            with calibration data also in the norm of outputs.
        num_samples: how many windows of calibration data to use.
        max_length: tokens per window.
        bos: whether a window of text begins with BOS: ``"auto"`` if the tokenizer does so by
            itself; True or False.
        seed: draws the windows.
        progress: show progress bars.

    Returns:
        The rows, which print as a table and save as JSON and CSV.

    Raises:
        ModelError: if a weight has NaN or infinite entries; names the matrix.
        OptionError: if a format is unknown or can replace none of the matrices.
        CalibrationError: if calibration data cannot be used.

    Source: Yu and Wu, AAAI 2023, for the fraction of directions that hold 90 % of the energy of
        weights and features; Marchenko and Pastur, 1967, for random matrices.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> found = analyze(LlamaForCausalLM(tiny), range(3), max_length=3, progress=False)
        Traceback (most recent call last):
        tnlm.errors.CalibrationError: calibration is a range, but must be ...
        >>> found = analyze(LlamaForCausalLM(tiny), progress=False)
        >>> [row.name for row in found.weights][-1], found.weights[-1].spectrum.limit
        ('model.layers.0.mlp.down_proj', 16)
    """
    model = _as_dense(model)
    check_model(model)
    structures = _structures(formats)
    selection = select(model, ALL_LINEAR if targets is None else targets, ignore)
    chosen, skipped = selection.targets, dict(selection.skipped)
    _check_kinds(structures, chosen)
    check_weights(model, chosen)
    inputs = None
    protocol: dict[str, Any] = {"model": type(model).__name__, "formats": list(formats)}
    if calibration is not None:
        cut: dict[str, Any] = {"num_samples": num_samples, "max_length": max_length, "seed": seed}
        batches = token_batches(calibration, tokenizer, **cut, bos=bos, model=model)
        check_batches(model, batches)
        modules = list(dict.fromkeys(t.module for t in chosen if t.kind == "linear"))
        if modules:
            inputs = collect(model, modules, batches, progress=progress)
        protocol |= {**cut, "tokens": count_tokens(batches)}
        if begins(calibration, tokenizer, bos):
            protocol["bos"] = True
        release()
    found = _Rows([], [], [])
    for target in tqdm(chosen, desc="analyzing", unit="matrix", disable=not progress):
        weight, seen = target.weight(model).cpu(), None
        if calibration is not None and target.kind != "linear":
            skipped[target.name] = EMBEDDING
        elif inputs is not None and target.module not in inputs.leaders:
            skipped[target.name] = UNSEEN
        else:
            seen = inputs
        found.add(target, weight, seen, structures)
    rows = tuple(found.weights), tuple(found.features), tuple(found.curves)
    return Analysis(*rows, skipped, protocol)


@dataclass(frozen=True)
class _Rows:
    """The rows computed so far."""

    weights: list[WeightRow]
    features: list[FeatureRow]
    curves: list[CurveRow]

    def add(
        self,
        target: Target,
        weight: Tensor,
        inputs: Statistics | None,
        structures: Sequence[Format[Any]],
    ) -> None:
        """Analyze one matrix; ``inputs`` is None if its outputs are not analyzed."""
        row = weight_row(target.name, weight)
        self.weights.append(row)
        metrics = {"identity": Metric()}
        if inputs is not None:
            moment, mean, count = (inputs.tensor(target.module, name) for name in MEASURED)
            self.features.extend(feature_rows(target.name, weight, moment, mean, int(count)))
            if structures:
                metrics["input"] = InputMoment(moment)
        stable = row.spectrum.stable_rank
        self.curves.extend(curve_rows(target, weight, structures, metrics, stable))


def _as_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model, or a dense copy of a compressed one."""
    return model if config_of(model) is None else to_dense(copy.deepcopy(model))


def _structures(formats: Sequence[str]) -> list[Format[Any]]:
    if isinstance(formats, str):
        raise OptionError(
            f"formats={formats!r}; allowed: a list of names, as [{formats!r}]", argument="formats"
        )
    return [get_format(name) for name in formats]


def _check_kinds(structures: Sequence[Format[Any]], targets: Sequence[Target]) -> None:
    """Raise `OptionError` if a format can replace none of the targets."""
    kinds = {target.kind for target in targets}
    for structure in structures:
        if not kinds & structure.kinds:
            raise OptionError(
                f"formats= has {structure.name!r}, which only replaces "
                f"{' and '.join(sorted(structure.kinds))}; the targets are "
                f"{' and '.join(sorted(kinds))}",
                argument="formats",
            )
