"""A search over the sizes of all matrices together, by the divergence from the dense model."""

from tnlm.studies.level_search.result import LevelSearchResult
from tnlm.studies.level_search.selection import PUBLISHED, Selection

__all__ = ["PUBLISHED", "LevelSearchResult", "Selection"]
