"""compress, plan, report, to_dense: what users call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.compression.job import Data, prepare
from tnlm.compression.keywords import keywords_of, meant
from tnlm.compression.pipeline import carry_out, resume, settle
from tnlm.compression.request import make_request
from tnlm.errors import ModelError, OptionError
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report
from tnlm.targets.base import Selector
from tnlm.utils.undo import leaves_model


@leaves_model
def compress(
    model: PreTrainedModel,
    scheme: str | Plan,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    metric: str | None = None,
    allocation: str | None = None,
    cascade: str | None = None,
    damping: float | None = None,
    refine: int = 0,
    share: int | None = None,
    recover: str | None = None,
    recover_tokens: int | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    tolerance: float | None = None,
    max_macs: float = 1.0,
    unit: str = "params",
    blocks: int | None = None,
    calibration: Any = None,
    training: Any = None,
    tokenizer: Any = None,
    num_samples: int | None = None,
    max_length: int | None = None,
    bos: bool | str | None = None,
    gradient_samples: int | None = None,
    cache_dir: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Compress a model in place, and return it.

    If anything fails, the model is left as it was. The report is at ``tnlm.report(model)``. What is
    about data, from ``calibration`` to ``seed``, is refused for a scheme that looks at none.

    Args:
        model: any Hugging Face model, not quantized.
        scheme: a name from ``tnlm.list_schemes()``, or a plan made by :func:`plan`.
        targets: the matrices chosen; see :func:`~tnlm.targets.select`. The scheme has a default.
        ignore: matrices left alone, in the same words.
        metric: how errors are measured, instead of the scheme's own: ``"identity"``,
            ``"diagonal"``, ``"input"``, ``"covariance"``, ``"centered"``, ``"two-sided"``,
            ``"fisher-inputs"``, ``"fisher-outputs"``, ``"fisher-both"``, ``"fisher-elements"``,
            ``"lora-fisher"``, ``"lora-taylor"``, ``"lora-both"``, ``"movement"`` or ``"pruned"``.
            The last two train and prune a copy of the model first, whose weights are then fitted.
        allocation: how the budget is shared out, instead of the scheme's own: ``"uniform"``,
            ``"loss"``, ``"energy"``, ``"last"`` or ``"truncation"``.
        cascade: ``"none"``; ``"sequential"``, every matrix fitted to the inputs that the
            compressed model gives it; or ``"anchored"``, fitted to the outputs that the dense
            model had there.
        damping: share of a second moment that is replaced by its mean diagonal, in [0, 1).
        refine: tokens of calibration data on which every block is tuned after fitting, to do what
            the dense block did; 0 for none. It changes norms, too.
        share: consecutive blocks whose matrices share their input factor, in low rank.
        recover: how the compressed model is trained in the end: ``"none"``; ``"lora"``, by adapters
            that are merged into the factors; ``"distill"``, all factors, to give the dense model's
            logits (after ``"kngpt2"`` its embeddings, attention and states, and labels);
            ``"finetune"``, all factors, on the data itself; or ``"mixed-rank"``, the same with
            layers that are their dense weights now and then, which are trained along
            (``"mixed-rank-frozen"`` leaves them). What tnlm did not replace stays as it is.
        recover_tokens: tokens of training data it sees, and pruning (200,000 if not given).
        keep: fraction of the whole model's parameters that remains, tied ones counted once.
        keep_targets: fraction of the targets' parameters that remains (0.8 if nothing is asked).
        tolerance: relative error allowed to every matrix, in the metric.
        max_macs: multiply-adds per token of a matrix, at most this multiple of the dense ones.
        unit: what ``keep`` and ``keep_targets`` count: ``"params"``, ``"bytes"`` or ``"macs"``.
        blocks: how many of the last blocks are cut, for ``allocation="last"``.
        calibration: a list of strings, a text or JSONL file, token ids, a DataLoader or a
            ``datasets.Dataset``; for schemes that look at data. See
            :func:`tnlm.calibration.data.token_batches`.
        training: data for ``recover`` and pruning, as ``calibration``, which it is drawn from if
            not given.
        tokenizer: turns texts into ids.
        num_samples: windows of calibration data used (64 if not given).
        max_length: tokens in a window (512 if not given).
        bos: whether a window of text begins with BOS: ``"auto"``, as the tokenizer puts it in front
            of a text by itself; True or False (``"auto"`` if not given).
        gradient_samples: windows used for gradients (16 if not given), where they are needed.
        cache_dir: keeps calibration statistics between runs.
        seed: draws the windows, the labels that gradients are taken of, the starts of LoRAs, and
            the order in which anything is trained (0 if not given).
        progress: show progress bars.
        **options: the format's own: ``rank``, ``terms``, ``ranks``, ``out_split``, ``in_split``,
            ``gauge``; integers or lists of integers. Under ``"fisher-elements"`` also ``sweeps``,
            the most passes of its least squares, and ``ridge``, which shrinks the factors.

    Returns:
        The same model, whose chosen modules are factorized.

    Raises:
        TnlmError: one of its children, before the model is changed.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = compress(LlamaForCausalLM(tiny), "svd", keep_targets=0.5)
        >>> model.model.layers[0].mlp.up_proj.right  # 6 of its 16 columns are an identity block
        ArrangedLinear(in_features=10, out_features=6, bias=False)
    """
    data = Data(
        calibration,
        tokenizer,
        num_samples,
        max_length,
        cache_dir,
        seed,
        gradient_samples,
        training,
        bos,
    )
    if isinstance(scheme, Plan):
        asked = (targets, ignore, metric, allocation, cascade, damping, share, keep, keep_targets)
        _only_plan(
            *asked, tolerance, recover, recover_tokens, refine, max_macs, unit, blocks, options
        )
    else:
        request = make_request(
            scheme,
            metric=metric,
            allocation=allocation,
            cascade=cascade,
            damping=damping,
            refine=refine,
            share=share,
            recover=recover,
            recover_tokens=recover_tokens,
            keep=keep,
            keep_targets=keep_targets,
            tolerance=tolerance,
            max_macs=max_macs,
            unit=unit,
            blocks=blocks,
            options=options,
            keywords=keywords_of(compress),
        )
    with torch.inference_mode(False):  # the model can be trained, wherever it was compressed
        if isinstance(scheme, Plan):
            decided, job = resume(model, scheme, data, progress)
        else:
            job = prepare(model, request, targets, ignore, data, progress)
            decided = settle(model, job, predict=False, progress=progress)
        return carry_out(model, job, decided, progress)


@leaves_model
def plan(
    model: PreTrainedModel,
    scheme: str,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    metric: str | None = None,
    allocation: str | None = None,
    cascade: str | None = None,
    damping: float | None = None,
    refine: int = 0,
    share: int | None = None,
    recover: str | None = None,
    recover_tokens: int | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    tolerance: float | None = None,
    max_macs: float = 1.0,
    unit: str = "params",
    blocks: int | None = None,
    calibration: Any = None,
    training: Any = None,
    tokenizer: Any = None,
    num_samples: int | None = None,
    max_length: int | None = None,
    bos: bool | str | None = None,
    gradient_samples: int | None = None,
    cache_dir: str | Path | None = None,
    seed: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Plan:
    """Decide what :func:`compress` would do, with predicted errors; no weight changes.

    The arguments are those of :func:`compress`.

    Returns:
        A plan that prints as a table, round-trips through JSON, and can be given to
        :func:`compress` in place of the scheme.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> decided = plan(LlamaForCausalLM(tiny), "kron", terms=2, targets=["up_proj"])
        >>> decided.layers[0].format, decided.layers[0].keep <= 0.8
        ('kronecker', True)
    """
    request = make_request(
        scheme,
        metric=metric,
        allocation=allocation,
        cascade=cascade,
        damping=damping,
        refine=refine,
        share=share,
        recover=recover,
        recover_tokens=recover_tokens,
        keep=keep,
        keep_targets=keep_targets,
        tolerance=tolerance,
        max_macs=max_macs,
        unit=unit,
        blocks=blocks,
        options=options,
        keywords=keywords_of(plan),
    )
    data = Data(
        calibration,
        tokenizer,
        num_samples,
        max_length,
        cache_dir,
        seed,
        gradient_samples,
        training,
        bos,
    )
    with torch.inference_mode(False):
        job = prepare(model, request, targets, ignore, data, progress)
        return settle(model, job, predict=True, progress=progress)


def report(model: PreTrainedModel) -> Report:
    """Return the report of the compression that made a model in this process.

    Raises:
        ModelError: if the model was not compressed here; a saved one has ``tnlm_report.json``.
    """
    found = getattr(model, "tnlm_report", None)
    if not isinstance(found, Report):
        raise ModelError(
            "this model was not compressed in this process; tnlm.save writes the report"
        )
    return found


@leaves_model
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a compressed model into an ordinary dense one, in place, and return it.

    The result computes the same function and loads anywhere without tnlm.

    Raises:
        ModelError: if the model is not compressed.
    """
    if config_of(model) is None:
        raise ModelError("the model is not compressed by tnlm")
    with torch.inference_mode(False):
        dense: PreTrainedModel = model.dequantize()
    vars(dense).pop("tnlm_report", None)
    return dense


def _only_plan(*given: Any) -> None:
    defaults: tuple[Any, ...] = (*[None] * 12, 0, 1.0, "params", None, {})
    if given != defaults:
        hint = meant(given[-1], compress)
        raise OptionError(f"a plan holds targets, budget and options already; give it alone{hint}")
