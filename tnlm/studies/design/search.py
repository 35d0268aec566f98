"""search: the Pareto front of a design space, with an evolutionary or a Bayesian sampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.errors import OptionError, did_you_mean
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.front import Front
from tnlm.studies.design.schedules import spread
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.storage import open_study
from tnlm.studies.design.variants import Variants
from tnlm.studies.design.worker import Worker
from tnlm.studies.scores import ModelScore
from tnlm.utils.checks import check_whole
from tnlm.utils.hashing import model_hash

COUNTED = ("params", "bytes", "macs")
"""Objectives that are computed from the space, without running the model."""
SAMPLERS = ("nsga2", "tpe")


def search(
    model: PreTrainedModel,
    space: DesignSpace,
    *,
    objectives: Mapping[str, ModelScore | str],
    maximize: Collection[str] = (),
    trials: int = 100,
    storage: str | Path | None = None,
    sampler: str = "nsga2",
    start: Sequence[Configuration] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """Search a design space for its Pareto front; the model is left unchanged.

    Processes that call this with the same arguments and the same ``storage`` share one search. To
    replace a process that was killed, call it again: finished trials are in the journal. A
    configuration that is drawn again is not measured again, but counts as a trial, and the next one
    is drawn at random. The dense model is always measured.

    If an objective raises a :class:`tnlm.TnlmError` or is not finite, the trial is recorded as
    failed, with the reason, and the search continues.

    Args:
        model: any Hugging Face model, not compressed.
        space: its design space.
        objectives: what to optimize, by name: a callable that takes the model and returns a
            number; or ``"params"``, ``"bytes"`` or ``"macs"`` of the whole model, which are
            counted.
        maximize: names of the objectives of which higher is better; lower is better for others.
        trials: total number of trials, over all processes and calls; fewer if the space is
            exhausted.
        storage: the journal file; None keeps the search in memory.
        sampler: ``"nsga2"`` (Deb et al. 2002) or ``"tpe"`` (multi-objective tree-structured
            Parzen estimators, Ozaki et al. 2020), both optuna's.
        start: configurations to measure first, after the dense model; by default 1, 2, 4, ...
            evenly spaced layers, with all their matrices at the first rank.
        seed: draws the configurations; a single process that is interrupted and called again
            draws the same ones as without the interruption.
        progress: show a progress bar.

    Returns:
        The front of all measured configurations, the dense model's point, and the failures.

    Raises:
        OptionError: if an argument is invalid, or optuna is not installed.
        CheckpointError: if the journal cannot be written or belongs to another search; raised
            before any work.
        EvaluationError: if the dense model cannot be measured, or an objective is constant.
        TnlmError: other subclasses, if the model does not fit the space.

    Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626, for the space.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=2, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> def norm(model):
        ...     return float(model.model.layers[1].mlp.up_proj.weight.norm())
        >>> space = DesignSpace(model, layers=[0], tensors=["up_proj"])
        >>> search(model, space, objectives={"size": "params", "macs": "macs"}, trials=9,
        ...        progress=False).points[0].values
        {'size': 1728.0, 'macs': 1432.0}
    """
    _check(objectives, maximize, trials, sampler)
    begin = _start(space) if start is None else list(start)
    for configuration in begin:
        reason = space.broken(configuration)
        if reason is not None:
            raise OptionError(f"start: {configuration}: {reason}")
    variants = Variants(model, space)
    about = {
        "space": space.to_dict(),
        "model": model_hash(model),
        "objectives": {name: name in maximize for name in objectives},
    }
    study = open_study(storage, [name in maximize for name in objectives], about)
    worker = Worker(study, space, variants, objectives)
    with tqdm(total=trials, desc="search", disable=not progress) as bar:
        while worker.finished < trials and len(worker.seen()) < space.count(distinct=True):
            bar.update(worker.finished - bar.n)
            worker.one(worker.pending((DENSE, *begin)), sampler, seed)
        bar.update(worker.finished - bar.n)
        if DENSE.key not in worker.seen():  # it was left to a process that was stopped
            worker.one(DENSE, sampler, seed)
    return worker.front(maximize)


def _check(
    objectives: Mapping[str, ModelScore | str], maximize: Collection[str], trials: int, sampler: str
) -> None:
    if not objectives:
        raise OptionError("objectives={}; give at least one")
    for name, objective in objectives.items():
        if isinstance(objective, str) and objective not in COUNTED:
            hint = did_you_mean(objective, COUNTED)
            raise OptionError(f"objective {name!r} is {objective!r}{hint}; or a callable")
    if isinstance(maximize, str):
        raise OptionError(f"maximize={maximize!r}; allowed: a collection of names")
    for name in maximize:
        if name not in objectives:
            raise OptionError(f"maximize has {name!r}{did_you_mean(name, objectives)}")
    check_whole("trials", trials)
    if sampler not in SAMPLERS:
        raise OptionError(f"sampler={sampler!r}{did_you_mean(sampler, SAMPLERS)}")


def _start(space: DesignSpace) -> list[Configuration]:
    layers, count, found = space.sets.layers, 1, []
    while count <= len(layers):
        found.append(space.all_tensors(space.sets.thin(spread(layers, count))))
        count *= 2
    return list(dict.fromkeys(found))
