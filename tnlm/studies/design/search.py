"""search: the Pareto front of a design space, by an evolutionary or a Bayesian sampler."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.errors import OptionError, did_you_mean
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.front import Front
from tnlm.studies.design.schedules import spread
from tnlm.studies.design.scores import Measure
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.design.storage import open_study
from tnlm.studies.design.variants import Trials
from tnlm.studies.design.worker import Run

COUNTED = ("params", "bytes", "macs")
"""Objectives that the space itself prices; nothing is run for them."""
SAMPLERS = ("nsga2", "tpe")


def search(
    model: PreTrainedModel,
    space: DesignSpace,
    *,
    objectives: Mapping[str, Measure | str],
    maximize: Collection[str] = (),
    trials: int = 100,
    storage: str | Path | None = None,
    sampler: str = "nsga2",
    start: Sequence[Configuration] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Front:
    """Search a design space for its Pareto front; the model is left as it was.

    Every process that calls this with the same arguments and the same ``storage`` takes part in the
    search, and a process that was killed is replaced by calling it again: finished trials are in
    the journal. What is there already is not measured again, but counts as a trial, and the next
    configuration is drawn at random. The dense model is always measured.

    An objective that fails with a :class:`tnlm.TnlmError`, or gives what is not finite, makes a
    failed trial, which is recorded with the reason; the search goes on.

    Args:
        model: any Hugging Face model, not compressed.
        space: its design space.
        objectives: names to what is measured: a callable that takes the model and returns a
            number; or ``"params"``, ``"bytes"`` or ``"macs"`` of the whole model, counted.
        maximize: the names of objectives of which more is better; less of the others is.
        trials: how many there are in the end, in all processes and all calls together; fewer if
            the space is exhausted.
        storage: the journal's file; None keeps the search in memory.
        sampler: ``"nsga2"`` (Deb et al. 2002) or ``"tpe"`` (multi-objective tree-structured
            Parzen estimators, Ozaki et al. 2020), both optuna's.
        start: what is measured first, after the dense model; by default 1, 2, 4, ... layers,
            evenly spread, with all their matrices at the first rank.
        seed: draws the configurations; a single process that was interrupted, and called again,
            goes on with those that it would have drawn.
        progress: show a progress bar.

    Returns:
        The front of all that was measured, the dense model's point, and what failed.

    Raises:
        OptionError: for objectives, a sampler or a start that are not allowed, or without optuna.
        CheckpointError: if the journal cannot be written, or is of another search; before any work.
        EvaluationError: if the dense model cannot be measured, or an objective is constant.
        TnlmError: other children of it, for a model that does not fit the space.

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
    tried = Trials(model, space)
    about = {
        "space": space.to_dict(),
        "model": tried.fingerprint(),
        "objectives": {name: name in maximize for name in objectives},
    }
    study = open_study(storage, [name in maximize for name in objectives], about)
    run = Run(study, space, tried, objectives)
    with tqdm(total=trials, desc="search", disable=not progress) as bar:
        while run.finished < trials and len(run.seen()) < space.count(distinct=True):
            bar.update(run.finished - bar.n)
            run.one(run.pending((DENSE, *begin)), sampler, seed)
        bar.update(run.finished - bar.n)
        if DENSE.key not in run.seen():  # a process that was stopped had taken it
            run.one(DENSE, sampler, seed)
    return run.front(maximize)


def _check(
    objectives: Mapping[str, Measure | str], maximize: Collection[str], trials: int, sampler: str
) -> None:
    if not objectives:
        raise OptionError("objectives={}; give one at least")
    for name, objective in objectives.items():
        if isinstance(objective, str) and objective not in COUNTED:
            hint = did_you_mean(objective, COUNTED)
            raise OptionError(f"objective {name!r} is {objective!r}{hint}; or a callable")
    if isinstance(maximize, str):
        raise OptionError(f"maximize={maximize!r}; allowed: a collection of names")
    for name in maximize:
        if name not in objectives:
            raise OptionError(f"maximize has {name!r}{did_you_mean(name, objectives)}")
    if trials < 1:
        raise OptionError(f"trials={trials}; allowed: at least 1")
    if sampler not in SAMPLERS:
        raise OptionError(f"sampler={sampler!r}{did_you_mean(sampler, SAMPLERS)}")


def _start(space: DesignSpace) -> list[Configuration]:
    layers, count, found = space.sets.layers, 1, []
    while count <= len(layers):
        found.append(space.all_tensors(space.sets.thin(spread(layers, count))))
        count *= 2
    return list(dict.fromkeys(found))
