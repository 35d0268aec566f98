"""Measures models: perplexity, benchmarks, speed, memory and energy."""

from __future__ import annotations

from tnlm.evaluation.efficiency import efficiency
from tnlm.evaluation.flips import Flips
from tnlm.evaluation.local_tasks import lm_eval_tasks
from tnlm.evaluation.perplexity import Perplexity, perplexity
from tnlm.evaluation.results import Evaluation, Figure, TaskResult
from tnlm.evaluation.running import evaluate
from tnlm.evaluation.speed import decode_rates
from tnlm.evaluation.tasks import list_tasks
from tnlm.evaluation.usage import Efficiency, Spread, Timing, Usage

__all__ = [
    "Efficiency",
    "Evaluation",
    "Figure",
    "Flips",
    "Perplexity",
    "Spread",
    "TaskResult",
    "Timing",
    "Usage",
    "decode_rates",
    "efficiency",
    "evaluate",
    "list_tasks",
    "lm_eval_tasks",
    "perplexity",
]
