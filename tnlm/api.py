"""compress, plan, report, to_dense: what users call."""

from __future__ import annotations

from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tnlm.checkpoint.describing import saved_report
from tnlm.checkpoint.reports import known_report
from tnlm.checkpoint.sums import REPORT_FILE
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.compression.alike import check_alike
from tnlm.compression.choices import Budget, Recovery, gather_choices
from tnlm.compression.earlier import check_alone
from tnlm.compression.folding import unfold_for
from tnlm.compression.job import prepare
from tnlm.compression.pipeline import carry_out, resume, settle
from tnlm.compression.request import request_of
from tnlm.errors import ModelError
from tnlm.layers.unfolded import refold
from tnlm.parallel.choose import workers_of
from tnlm.parallel.workers import Workers
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report
from tnlm.schemes.base import Scheme
from tnlm.targets.base import Selector
from tnlm.targets.checks import check_bare
from tnlm.utils.undo import leaves_model


@leaves_model
def compress(
    model: PreTrainedModel,
    scheme: str | Scheme | Plan,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    budget: Budget | None = None,
    recovery: Recovery | None = None,
    seed: int | None = None,
    workers: Workers | Executor | str | None = None,
    progress: bool = True,
    **choices: Any,
) -> PreTrainedModel:
    """Compress a model in place, and return it.

    If anything fails, the model is left unchanged. ``tnlm.report(model)`` returns the report.
    Arguments about data are rejected for schemes that use none.

    Args:
        model: any Hugging Face model, not quantized.
        scheme: a name from ``tnlm.list_schemes()``, a modified copy of a scheme from
            :func:`scheme`, or a plan from :func:`plan`, with which only data and the bits of its
            matrices (``precision``, ``group``) may be given.
        targets: the matrices to compress; see :func:`tnlm.targets.selection.select`. The scheme
            has a default.
        ignore: matrices to leave alone, in the same form.
        keep: fraction of the whole model's parameters to keep, tied ones counted once.
        keep_targets: fraction of the targets' parameters to keep (0.8 if no size is given).
        calibration: a list of strings, a text or JSONL file, token ids, batches of a processor, a
            DataLoader or a ``datasets.Dataset``; ``"self"`` for text that the model writes; or a
            :class:`Calibration`, which also sets how it is cut.
        tokenizer: turns texts into token ids.
        budget: further limits, see :class:`Budget`.
        recovery: training after the fit, see :class:`Recovery`.
        seed: seeds the choice of windows, sampled labels, LoRA initialisation and training order
            (0 if not given).
        workers: share out the work: ``"ranks"`` to the processes of torch.distributed, which all
            make this call and get the same result; an executor, such as a
            ``concurrent.futures.ProcessPoolExecutor``, to which single fits are given. By default
            this process works alone.
        progress: show progress bars.
        **choices: any field of :class:`Calibration`, :class:`Budget`, :class:`Recovery` or
            :class:`~tnlm.schemes.base.Scheme` on its own, such as ``metric``, ``allocation``,
            ``cascade``, ``anchor``, ``refine``, ``refine_passes``, ``recover``, ``tolerance``,
            ``max_macs``, ``unit``, ``num_samples``, ``max_length`` or ``cache_dir``
            (``tnlm compress --help`` lists all); and the options of the scheme's formats:
            ``rank``, ``terms``, ``ranks``, ``out_split``, ``in_split``, ``gauge``, integers or
            lists of integers; with ``"fisher-elements"`` also ``sweeps``, the maximum number of
            least-squares passes, and ``ridge``, which shrinks the factors.

    Returns:
        The same model, with the chosen modules factorized.

    Raises:
        TnlmError: one of its subclasses; the model is unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = compress(LlamaForCausalLM(tiny), "svd", keep_targets=0.5)
        >>> model.model.layers[0].mlp.up_proj.right  # 6 of its 16 columns are an identity block
        ArrangedLinear(in_features=10, out_features=6, bias=False)
    """
    given = {
        "keep": keep,
        "keep_targets": keep_targets,
        "calibration": calibration,
        "tokenizer": tokenizer,
        "budget": budget,
        "recovery": recovery,
        "seed": seed,
        **choices,
    }
    # inference_mode(False) keeps the model trainable, wherever it is compressed
    with torch.inference_mode(False), workers_of(workers) as team:
        check_alike(model, team)
        if isinstance(scheme, Plan):
            check_alone(given, targets, ignore)
            decided, job = resume(model, scheme, given, progress, team)
        else:
            asked = gather_choices(scheme, given)
            request = request_of(asked)
            unfold_for(model, request)
            job = prepare(model, request, targets, ignore, asked.calibration, progress, team)
            decided = settle(model, job, predict=False, progress=progress)
        return carry_out(model, job, decided, progress)


@leaves_model
def plan(
    model: PreTrainedModel,
    scheme: str | Scheme,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    workers: Workers | Executor | str | None = None,
    progress: bool = True,
    **choices: Any,
) -> Plan:
    """Plan what :func:`compress` would do, with predicted errors, without changing the model.

    The arguments are those of :func:`compress`.

    Returns:
        A plan that prints as a table, round-trips through JSON, and can be passed to
        :func:`compress` in place of a scheme.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> decided = plan(LlamaForCausalLM(tiny), "kron", terms=2, targets=["up_proj"])
        >>> decided.layers[0].format, decided.layers[0].keep <= 0.8
        ('kronecker', True)
    """
    asked = gather_choices(scheme, choices)
    with torch.inference_mode(False), workers_of(workers) as team:
        check_alike(model, team)
        request = request_of(asked)
        unfold_for(model, request)
        job = prepare(model, request, targets, ignore, asked.calibration, progress, team)
        decided = settle(model, job, predict=True, progress=progress)
        refold(model)
        return decided


def report(model: PreTrainedModel | str | Path) -> Report:
    """Return the report of the compression that made a model.

    Args:
        model: compressed in this process, or loaded from a directory; or that directory, to which
            ``tnlm.save`` wrote it. Of a loaded model the report is the saved one.

    Raises:
        ModelError: if the model was not compressed in this process and has no saved report.
        CheckpointError: if the directory holds no report.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> report(compress(LlamaForCausalLM(tiny), "svd", progress=False)).plan.scheme
        'svd'
    """
    if isinstance(model, str | Path):
        return saved_report(model)
    found = known_report(model)
    if found is not None:
        return found
    raise ModelError(
        "this model was not compressed in this process, nor loaded from a directory with a report; "
        f"tnlm.save writes {REPORT_FILE} beside a model"
    )


@leaves_model
def to_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a compressed model into an ordinary dense one, in place, and return it.

    The result computes the same function and loads anywhere without tnlm.

    Raises:
        ModelError: if the model is not compressed, or adapters wrap its layers.
    """
    if config_of(model) is None:
        raise ModelError("the model is not compressed by tnlm")
    check_bare(model)
    with torch.inference_mode(False):
        dense: PreTrainedModel = model.dequantize()
    return dense
