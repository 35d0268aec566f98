"""Training that recovers quality after compression: fine-tuning, distillation, LoRAs, pruning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tnlm.recovery.distillation import distill
    from tnlm.recovery.training import finetune

# Imported when first used, since the trainer takes longer to import than all the rest.
_HOMES = {
    "distill": "tnlm.recovery.distillation",
    "finetune": "tnlm.recovery.training",
}

__all__ = ["distill", "finetune"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tnlm.recovery' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
