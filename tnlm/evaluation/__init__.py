"""Measure models: perplexity, benchmarks, decoding speed."""

from __future__ import annotations

from tnlm.evaluation.harness import harness, lm_eval_tasks
from tnlm.evaluation.perplexity import Perplexity, perplexity
from tnlm.evaluation.results import Evaluation, Figure, Flips, TaskResult
from tnlm.evaluation.running import evaluate
from tnlm.evaluation.speed import decode_rates
from tnlm.evaluation.tasks import list_tasks

__all__ = [
    "Evaluation",
    "Figure",
    "Flips",
    "Perplexity",
    "TaskResult",
    "decode_rates",
    "evaluate",
    "harness",
    "list_tasks",
    "lm_eval_tasks",
    "perplexity",
]
