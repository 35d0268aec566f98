"""Compress language models with tensor networks and low-rank structure.

Importing tnlm is enough for ``AutoModel...from_pretrained`` to read compressed models.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from tnlm.api import compress, plan, report, to_dense
    from tnlm.calibration.labelled import labelled
    from tnlm.checkpoint.loading import load
    from tnlm.checkpoint.saving import save
    from tnlm.checkpoint.sums import verify
    from tnlm.checkpoint.vocabulary import set_rows
    from tnlm.compression.choices import Budget, Calibration, Recovery, scheme
    from tnlm.compression.register import register, unregister
    from tnlm.compression.scratch import from_config
    from tnlm.errors import TnlmError
    from tnlm.evaluation import Efficiency, Evaluation, efficiency, evaluate, perplexity
    from tnlm.evaluation.predicted_speed import predict_speed
    from tnlm.layers.arranged import arrange
    from tnlm.layers.peft_names import adaptable
    from tnlm.layers.rebuilt import keep_rebuilt
    from tnlm.plans.plan import Plan
    from tnlm.plans.report import Report
    from tnlm.recovery.distillation import distill
    from tnlm.recovery.heal import heal
    from tnlm.recovery.pruning.prune import prune
    from tnlm.recovery.training import finetune
    from tnlm.runtimes.export import export
    from tnlm.schemes import list_schemes
    from tnlm.studies.analysis.analyze import analyze
    from tnlm.studies.analysis.intrinsic import intrinsic_dimension
    from tnlm.studies.analysis.result import Analysis
    from tnlm.studies.analysis.truncation import truncate_groups
    from tnlm.studies.design.configuration import Configuration
    from tnlm.studies.design.rules import Rule
    from tnlm.studies.design.search import search
    from tnlm.studies.design.space import DesignSpace
    from tnlm.studies.design.sweep import sweep
    from tnlm.studies.page.write import write_page
    from tnlm.studies.rank_search.search import rank_search

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, because transformers' modelling
# code takes longer to import than torch.
_HOMES = {
    "intrinsic_dimension": "tnlm.studies.analysis.intrinsic",
    "analyze": "tnlm.studies.analysis.analyze",
    "Analysis": "tnlm.studies.analysis.result",
    "truncate_groups": "tnlm.studies.analysis.truncation",
    "compress": "tnlm.api",
    "plan": "tnlm.api",
    "report": "tnlm.api",
    "to_dense": "tnlm.api",
    "adaptable": "tnlm.layers.peft_names",
    "set_rows": "tnlm.checkpoint.vocabulary",
    "labelled": "tnlm.calibration.labelled",
    "Configuration": "tnlm.studies.design.configuration",
    "Rule": "tnlm.studies.design.rules",
    "DesignSpace": "tnlm.studies.design.space",
    "search": "tnlm.studies.design.search",
    "sweep": "tnlm.studies.design.sweep",
    "TnlmError": "tnlm.errors",
    "Efficiency": "tnlm.evaluation",
    "Evaluation": "tnlm.evaluation",
    "efficiency": "tnlm.evaluation",
    "evaluate": "tnlm.evaluation",
    "perplexity": "tnlm.evaluation",
    "arrange": "tnlm.layers.arranged",
    "keep_rebuilt": "tnlm.layers.rebuilt",
    "predict_speed": "tnlm.evaluation.predicted_speed",
    "Plan": "tnlm.plans.plan",
    "write_page": "tnlm.studies.page.write",
    "distill": "tnlm.recovery.distillation",
    "heal": "tnlm.recovery.heal",
    "prune": "tnlm.recovery.pruning.prune",
    "finetune": "tnlm.recovery.training",
    "Report": "tnlm.plans.report",
    "load": "tnlm.checkpoint.loading",
    "save": "tnlm.checkpoint.saving",
    "list_schemes": "tnlm.schemes",
    "export": "tnlm.runtimes.export",
    "Budget": "tnlm.compression.choices",
    "Calibration": "tnlm.compression.choices",
    "Recovery": "tnlm.compression.choices",
    "scheme": "tnlm.compression.choices",
    "register": "tnlm.compression.register",
    "unregister": "tnlm.compression.register",
    "from_config": "tnlm.compression.scratch",
    "rank_search": "tnlm.studies.rank_search.search",
    "verify": "tnlm.checkpoint.sums",
}

__all__ = [
    "Analysis",
    "Budget",
    "Calibration",
    "Configuration",
    "DesignSpace",
    "Efficiency",
    "Evaluation",
    "Plan",
    "Recovery",
    "Report",
    "Rule",
    "TnlmError",
    "adaptable",
    "analyze",
    "arrange",
    "compress",
    "distill",
    "efficiency",
    "evaluate",
    "export",
    "finetune",
    "from_config",
    "heal",
    "intrinsic_dimension",
    "keep_rebuilt",
    "labelled",
    "list_schemes",
    "load",
    "perplexity",
    "plan",
    "predict_speed",
    "prune",
    "rank_search",
    "register",
    "report",
    "save",
    "scheme",
    "search",
    "set_rows",
    "sweep",
    "to_dense",
    "truncate_groups",
    "unregister",
    "verify",
    "write_page",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module("tnlm.studies.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'tnlm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "plot"})


@wrapt.when_imported("transformers.modeling_utils")
def _register(_: ModuleType) -> None:
    """Register with transformers as soon as its modelling code is loaded, and not before."""
    importlib.import_module("tnlm.checkpoint.transformers_plugin")
    importlib.import_module("tnlm.checkpoint.writing").install()
