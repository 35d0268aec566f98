"""level_search: the sizes of all matrices, evolved by the divergence from the dense model."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.allocation.base import Problem
from tnlm.allocation.curves import Curve, check_budget, curves
from tnlm.compression.choices import gather_choices
from tnlm.compression.folding import unfold_for
from tnlm.compression.job import Job, prepare
from tnlm.compression.pipeline import carry_out, settle
from tnlm.compression.request import Request, request_of
from tnlm.compression.rules import NO_RECOVERY
from tnlm.errors import OptionError
from tnlm.evaluation.mode import check_causal
from tnlm.plans.plan import LayerPlan
from tnlm.schemes.base import Scheme
from tnlm.studies.journal import Journal, check_journal
from tnlm.studies.level_search.divergence import Divergence
from tnlm.studies.level_search.evolution import Evolution
from tnlm.studies.level_search.result import LevelSearchResult
from tnlm.studies.level_search.selection import DEFAULT, Selection, check_selection
from tnlm.studies.level_search.trials import Trials
from tnlm.studies.level_search.windows import Windows, windows_of
from tnlm.studies.mounted import mounting
from tnlm.targets.base import Selector
from tnlm.utils.checks import check_whole
from tnlm.utils.hashing import model_hash
from tnlm.utils.undo import leaves_model

logger = logging.getLogger("tnlm")

FILE = "levels.jsonl"
"""The journal of a search, in its output_dir."""


@leaves_model
def level_search(
    model: PreTrainedModel,
    scheme: str | Scheme = "auto",
    *,
    search: Any,
    generations: int = 10,
    scale_tokens: int = 0,
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

    With ``scale_tokens``, the divergence of every unit that is compressed by itself is measured
    first, on windows that no generation uses. The predicted losses of a unit are scaled by the root
    of measured over predicted, the budget is allocated again, and the search starts from there if
    that diverges less than the choice of least predicted loss.

    A generation runs ``selection.cost`` tokens through compressed models (32,768 by default), and
    the dense model runs once over the text; both are logged before the search starts.

    Args:
        model: a causal model, not compressed.
        scheme: a scheme whose allocation is ``"loss"``, such as ``"auto"``.
        search: text on which states are measured, in any form that training takes; apart from the
            calibration data, or the search fits itself to it.
        generations: how many; 0 only with ``scale_tokens``.
        scale_tokens: tokens on which every unit is measured by itself; 0 for not at all.
        selection: how offspring are selected; ``PUBLISHED`` costs 12 times as much.
        targets: the matrices; see :func:`tnlm.targets.selection.select`. The scheme has a default.
        ignore: matrices left alone, in the same form.
        output_dir: keeps every measurement in ``levels.jsonl``, so that the same search resumes
            after an interruption.
        progress: show progress bars.
        **choices: as for :func:`tnlm.compress`; ``tokenizer``, ``max_length`` and ``seed`` also
            cut ``search`` and draw the mutations.

    Returns:
        The plan, the divergence before and after, and the scales of all units if asked for.

    Raises:
        OptionError: if an option is invalid, the scheme has another allocation, or anything is to
            be trained after the search.
        EvaluationError: if the model is not causal, the text is shorter than a stage needs, or a
            divergence is not finite.
        CheckpointError: if ``output_dir`` cannot be written or belongs to another search.

    Source: EvoPress, Sieberling et al. 2024, arXiv 2410.14649; unequal levels at the start,
        and the scales, are ours.

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
    check_whole("scale_tokens", scale_tokens, least=0)
    _check_generations(generations, scale_tokens)
    asked = gather_choices(scheme, choices)
    request = request_of(asked)
    _check(request)
    check_causal(model, "a search over levels")
    file = None if output_dir is None else Path(output_dir) / FILE
    if file is not None:
        check_journal(file)
    cut = asked.calibration.cut
    text = windows_of(search, asked.calibration.tokenizer, cut.max_length, selection, scale_tokens)
    unfold_for(model, request)
    job = prepare(model, request, targets, ignore, asked.calibration, progress)
    dense = copy.deepcopy(model)
    place = f" behind {len(text.search)} windows"
    divergence, apart = Divergence(model, text.search), Divergence(model, text.apart, place)
    made: dict[str, Any] = {}

    def choose(problem: Problem) -> list[LayerPlan]:
        found = curves(problem)
        budget = check_budget(problem, found)
        journal = Journal(file, _about(model, job, found, text, cut.seed))
        _say(selection, generations, text, scale_tokens * len(found))
        with mounting(dense, job.selection.targets) as mounted:
            trials = Trials(model, dense, mounted, job, found, divergence, journal)
            evolution = Evolution(trials, found, budget, selection)
            parent = evolution.start()
            made["before"] = parent[1]
            if scale_tokens:
                scales = evolution.scales(parent[0], apart, scale_tokens, progress)
                made["scales"] = dict(zip(trials.names, scales, strict=True))
                first = parent
                parent, other = evolution.rescaled(first, scales)
                made["scaled"], made["unchanged"] = other[1], other[0] == first[0]
            parent, path = evolution.evolve(parent, generations, cut.seed, progress)
        made["after"], made["generations"] = parent[1], path
        return trials.layers(parent[0])

    decided = settle(model, job, predict=False, progress=progress, choose=choose)
    carry_out(model, job, decided, progress)
    return LevelSearchResult(decided, tokens=divergence.tokens + apart.tokens, **made)


def _check_generations(generations: int, scale_tokens: int) -> None:
    check_whole("generations", generations, least=0)
    if not generations and not scale_tokens:
        raise OptionError(
            "generations=0; allowed: a whole number of at least 1, or 0 with scale_tokens=",
            argument="generations",
        )


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
    changes = {"refine": request.refines, "recover": request.recover != NO_RECOVERY}
    for name in (name for name, given in changes.items() if given):
        raise OptionError(
            f"{name}= in a search over levels would change the model after it was measured; leave "
            "it out, and train the result with tnlm.heal or tnlm.finetune",
            argument=name,
        )


def _say(selection: Selection, generations: int, text: Windows, scaling: int) -> None:
    first = min(selection.tokens[-1], sum(map(len, text.search)))
    if scaling:
        logger.info(
            "units by themselves are measured on %s tokens first, all together", f"{scaling:,}"
        )
    logger.info(
        "the search runs up to %s tokens through compressed models and %s through the dense one",
        f"{generations * selection.cost + first:,}",
        f"{first:,}",
    )


def _about(
    model: PreTrainedModel, job: Job, found: Sequence[Curve], text: Windows, seed: int
) -> dict[str, Any]:
    """Return what the trials depend on; other generations or offspring go on with them."""
    specs = [
        [[each.format, dict(each.spec)] for each in c.layers] for curve in found for c in curve
    ]
    ids = [window.tolist() for window in (*text.search, *text.apart)]
    return {
        "model": model_hash(model),
        "calibration": job.evidence.fingerprint or None,
        "search": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "scheme": job.request.scheme.name,
        "request": job.request.record(),
        "levels": hashlib.sha256(json.dumps(specs).encode()).hexdigest(),
        "seed": seed,
    }
