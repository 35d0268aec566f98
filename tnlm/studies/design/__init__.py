"""The design space of a model: which layers and matrices, at which rank, and what it costs."""

from tnlm.studies.design.front import Front
from tnlm.studies.design.rules import INSIGHTS
from tnlm.studies.design.schedules import PUBLISHED, PUBLISHED_PERCENT
from tnlm.studies.design.sweep import Sweep

__all__ = ["INSIGHTS", "PUBLISHED", "PUBLISHED_PERCENT", "Front", "Sweep"]
