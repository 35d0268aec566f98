"""level_search: the sizes of all matrices, evolved by the divergence from the dense model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.allocation.base import Problem
from tnlm.allocation.curves import Curve, check_budget, curves
from tnlm.allocation.loss import least_loss
from tnlm.compression.choices import gather_choices
from tnlm.compression.folding import unfold_for
from tnlm.compression.job import Job, prepare
from tnlm.compression.pipeline import carry_out, settle
from tnlm.compression.request import Request, request_of
from tnlm.compression.rules import NO_RECOVERY
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation.mode import check_causal
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.recovery.examples import training_set
from tnlm.schemes.base import Scheme
from tnlm.studies.journal import Journal, check_journal
from tnlm.studies.level_search.divergence import Divergence
from tnlm.studies.level_search.levels import State, mutated, step_of
from tnlm.studies.level_search.selection import DEFAULT, Selection, check_selection
from tnlm.studies.level_search.trials import Trials
from tnlm.studies.mounted import mounting
from tnlm.targets.base import Selector
from tnlm.utils.checks import check_whole
from tnlm.utils.hashing import model_hash
from tnlm.utils.undo import leaves_model

logger = logging.getLogger("tnlm")

FILE = "levels.jsonl"
"""The journal of a search, in its output_dir."""


@dataclass(frozen=True)
class LevelSearchResult:
    """The result of a search over levels.

    Attributes:
        plan: the decision for every matrix.
        before: divergence of the loss-aware allocation, in nats per token.
        after: divergence of the plan, on the same tokens.
        generations: divergence of the parent after every generation.
        tokens: tokens that were run through compressed models in this call.
    """

    plan: Plan
    before: float
    after: float
    generations: tuple[float, ...]
    tokens: int

    def __str__(self) -> str:
        divergence = f"divergence: {self.before:.6g} -> {self.after:.6g} nats per token"
        cost = f"{len(self.generations)} generations, {self.tokens:,} tokens"
        return f"{self.plan}\n{divergence}, {cost}"

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(asdict(self), indent=1)


@leaves_model
def level_search(
    model: PreTrainedModel,
    scheme: str | Scheme = "auto",
    *,
    search: Any,
    generations: int = 10,
    selection: Selection = DEFAULT,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    output_dir: str | Path | None = None,
    progress: bool = True,
    **choices: Any,
) -> LevelSearchResult:
    """Compress a model in place, with sizes evolved by its divergence from the dense model.

    The search starts from the choice of least predicted loss, as :func:`tnlm.compress` makes it.
    Every generation switches sizes between units of the parent at the same budget, and measures
    KL(dense || compressed) on text that was held out. The best of its offspring replaces the
    parent if it is better, so that the result never is worse than the start on that text. Units
    are fitted anew for every size, each by itself.

    A generation runs ``selection.cost`` tokens through compressed models (32,768 by default), and
    the dense model runs once over the text; both are logged before the search starts.

    Args:
        model: a causal model, not compressed.
        scheme: a scheme whose allocation is ``"loss"``, such as ``"auto"``.
        search: text on which states are measured, in any form that training takes; apart from the
            calibration data, or the search fits itself to it.
        generations: how many.
        selection: how offspring are selected; ``PUBLISHED`` costs 12 times as much.
        targets: the matrices; see :func:`tnlm.targets.selection.select`. The scheme has a default.
        ignore: matrices left alone, in the same form.
        output_dir: keeps every measurement in ``levels.jsonl``, so that the same search resumes
            after an interruption.
        progress: show progress bars.
        **choices: as for :func:`tnlm.compress`; ``tokenizer``, ``max_length`` and ``seed`` also
            cut ``search`` and draw the mutations.

    Returns:
        The plan, and the divergence before and after.

    Raises:
        OptionError: if an option is invalid, the scheme has another allocation, or anything is to
            be trained after the search.
        EvaluationError: if the model is not causal, the text is shorter than a stage needs, or a
            divergence is not finite.
        CheckpointError: if ``output_dir`` cannot be written or belongs to another search.

    Source: EvoPress, Sieberling et al. 2024, arXiv 2410.14649; the start and unequal levels are
        ours.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> ids = torch.arange(96) * 7 % 29
        >>> found = level_search(LlamaForCausalLM(tiny), search=ids[:32], calibration=ids[32:],
        ...                      max_length=16, generations=1, progress=False,
        ...                      selection=Selection(2, (1,), (16,)))
        >>> found.after <= found.before
        True
    """
    check_selection(selection)
    check_whole("generations", generations)
    asked = gather_choices(scheme, choices)
    request = request_of(asked)
    _check(request)
    check_causal(model, "a search over levels")
    file = None if output_dir is None else Path(output_dir) / FILE
    if file is not None:
        check_journal(file)
    cut = asked.calibration.cut
    windows = _windows(search, asked.calibration.tokenizer, cut.max_length, max(selection.tokens))
    unfold_for(model, request)
    job = prepare(model, request, targets, ignore, asked.calibration, progress)
    divergence, path = Divergence(model, windows), []
    dense = copy.deepcopy(model)

    def choose(problem: Problem) -> list[LayerPlan]:
        found = curves(problem)
        budget = check_budget(problem, found)
        journal = Journal(file, _about(model, job, found, windows, cut.seed))
        with mounting(dense, job.selection.targets) as mounted:
            trials = Trials(model, dense, mounted, job, found, divergence, journal)
            start = _start(found, budget)
            draws, rounds = random.Random(cut.seed), range(generations)
            _say(selection, generations, windows)
            state, value = start, trials.measure(start, selection.tokens[-1])
            path.append(value)
            for _ in tqdm(rounds, desc="searching", unit="generation", disable=not progress):
                state, value = _generation(trials, found, state, value, budget, selection, draws)
                trials.keep(state)
                path.append(value)
        return trials.layers(state)

    decided = settle(model, job, predict=False, progress=progress, choose=choose)
    carry_out(model, job, decided, progress)
    return LevelSearchResult(decided, path[0], path[-1], tuple(path[1:]), divergence.tokens)


def _generation(
    trials: Trials,
    found: Sequence[Curve],
    parent: State,
    value: float,
    budget: float,
    selection: Selection,
    draws: random.Random,
) -> tuple[State, float]:
    """Return the best of the parent and its offspring, with its divergence."""
    step = step_of(found)
    pool = [mutated(found, parent, budget, step, draws) for _ in range(selection.offspring)]
    pool = [state for state in dict.fromkeys(pool) if state != parent]
    values: list[float] = []
    for count, tokens in zip(selection.survivors, selection.tokens, strict=True):
        values = [trials.measure(state, tokens) for state in pool]
        order = sorted(range(len(pool)), key=values.__getitem__)[:count]
        pool, values = [pool[index] for index in order], [values[index] for index in order]
    if not pool or values[0] >= value:
        return parent, value
    return pool[0], values[0]


def _start(found: Sequence[Curve], budget: float) -> State:
    """Return the state of least predicted loss."""
    chosen = least_loss(found, budget)
    return tuple(curve.index(candidate) for curve, candidate in zip(found, chosen, strict=True))


def _check(request: Request) -> None:
    """Raise `OptionError` unless the scheme has curves to search on, and each fit stands alone."""
    if request.allocation.name != "loss":
        raise OptionError(
            f"allocation={request.allocation.name!r} in a search over levels, which starts from "
            "the least predicted loss; allowed: allocation='loss', as scheme='auto' has it",
            argument=("allocation", "scheme"),
        )
    if request.cascade != "none":
        raise OptionError(
            f"cascade={request.cascade!r} in a search over levels, whose fits stand alone; "
            "allowed: cascade='none'",
            argument="cascade",
        )
    changes = {"refine": request.refine, "recover": request.recover != NO_RECOVERY}
    for name in (name for name, given in changes.items() if given):
        raise OptionError(
            f"{name}= in a search over levels would change the model after it was measured; leave "
            "it out, and train the result with tnlm.heal or tnlm.finetune",
            argument=name,
        )


def _windows(search: Any, tokenizer: Any, length: int, tokens: int) -> list[Any]:
    """Return the windows of the text, as token ids."""
    made = training_set(search, tokenizer, max_length=length, label=None)
    windows = [item["input_ids"] for item in made.items]
    if sum(map(len, windows)) < tokens:
        raise EvaluationError(
            f"search= has {sum(map(len, windows)):,} tokens, but a stage measures {tokens:,}; give "
            "more text, or a smaller selection=",
            argument=("search", "selection"),
        )
    return windows


def _say(selection: Selection, generations: int, windows: Sequence[Any]) -> None:
    first = min(selection.tokens[-1], sum(map(len, windows)))
    logger.info(
        "the search runs up to %s tokens through compressed models and %s through the dense one",
        f"{generations * selection.cost + first:,}",
        f"{first:,}",
    )


def _about(
    model: PreTrainedModel, job: Job, found: Sequence[Curve], windows: Sequence[Any], seed: int
) -> dict[str, Any]:
    """Return what the trials depend on; other generations or offspring go on with them."""
    specs = [
        [[each.format, dict(each.spec)] for each in c.layers] for curve in found for c in curve
    ]
    text = [window.tolist() for window in windows]
    return {
        "model": model_hash(model),
        "calibration": job.evidence.fingerprint or None,
        "search": hashlib.sha256(json.dumps(text).encode()).hexdigest(),
        "scheme": job.request.scheme.name,
        "request": job.request.record(),
        "levels": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "seed": seed,
    }
