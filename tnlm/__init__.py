"""Compress language models with tensor networks and low-rank structure.

Importing tnlm is enough for ``AutoModel...from_pretrained`` to read compressed models.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from tnlm.api import compress as compress
    from tnlm.api import plan as plan
    from tnlm.api import report as report
    from tnlm.api import to_dense as to_dense
    from tnlm.calibration.labelled import labelled as labelled
    from tnlm.checkpoint.loading import load as load
    from tnlm.checkpoint.saving import save as save
    from tnlm.checkpoint.sums import verify as verify
    from tnlm.checkpoint.vocabulary import set_rows as set_rows
    from tnlm.compression.choices import Budget as Budget
    from tnlm.compression.choices import Calibration as Calibration
    from tnlm.compression.choices import Recovery as Recovery
    from tnlm.compression.choices import scheme as scheme
    from tnlm.compression.procrustes import procrustes_rotation as procrustes_rotation
    from tnlm.compression.register import register as register
    from tnlm.compression.register import unregister as unregister
    from tnlm.compression.rotate import rotate as rotate
    from tnlm.compression.scratch import from_config as from_config
    from tnlm.errors import TnlmError as TnlmError
    from tnlm.evaluation import Efficiency as Efficiency
    from tnlm.evaluation import Evaluation as Evaluation
    from tnlm.evaluation import efficiency as efficiency
    from tnlm.evaluation import evaluate as evaluate
    from tnlm.evaluation import perplexity as perplexity
    from tnlm.evaluation.predicted_speed import predict_speed as predict_speed
    from tnlm.layers.arranged import arrange as arrange
    from tnlm.layers.peft_names import adaptable as adaptable
    from tnlm.layers.rebuilt import keep_rebuilt as keep_rebuilt
    from tnlm.plans.plan import Plan as Plan
    from tnlm.plans.report import Report as Report
    from tnlm.recovery.distillation import distill as distill
    from tnlm.recovery.heal import heal as heal
    from tnlm.recovery.pruning.prune import prune as prune
    from tnlm.recovery.training import finetune as finetune
    from tnlm.runtimes.compiled import compile_decoding as compile_decoding
    from tnlm.runtimes.export import export as export
    from tnlm.schemes import list_schemes as list_schemes
    from tnlm.streaming.compress import compress_files as compress_files
    from tnlm.studies.analysis.analyze import analyze as analyze
    from tnlm.studies.analysis.intrinsic import intrinsic_dimension as intrinsic_dimension
    from tnlm.studies.analysis.result import Analysis as Analysis
    from tnlm.studies.analysis.truncation import truncate_groups as truncate_groups
    from tnlm.studies.design.configuration import Configuration as Configuration
    from tnlm.studies.design.rules import Rule as Rule
    from tnlm.studies.design.search import search as search
    from tnlm.studies.design.space import DesignSpace as DesignSpace
    from tnlm.studies.design.sweep import sweep as sweep
    from tnlm.studies.level_search.search import level_search as level_search
    from tnlm.studies.page.write import write_page as write_page
    from tnlm.studies.rank_search.search import rank_search as rank_search

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used, because transformers' modelling
# code takes longer to import than torch.
_HOMES = {
    "intrinsic_dimension": "tnlm.studies.analysis.intrinsic",
    "analyze": "tnlm.studies.analysis.analyze",
    "Analysis": "tnlm.studies.analysis.result",
    "truncate_groups": "tnlm.studies.analysis.truncation",
    "compress": "tnlm.api",
    "compress_files": "tnlm.streaming.compress",
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
    "compile_decoding": "tnlm.runtimes.compiled",
    "Budget": "tnlm.compression.choices",
    "Calibration": "tnlm.compression.choices",
    "Recovery": "tnlm.compression.choices",
    "scheme": "tnlm.compression.choices",
    "register": "tnlm.compression.register",
    "unregister": "tnlm.compression.register",
    "rotate": "tnlm.compression.rotate",
    "procrustes_rotation": "tnlm.compression.procrustes",
    "from_config": "tnlm.compression.scratch",
    "level_search": "tnlm.studies.level_search.search",
    "rank_search": "tnlm.studies.rank_search.search",
    "verify": "tnlm.checkpoint.sums",
}

__all__ = sorted(_HOMES)


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
