"""A search that tries ranks on the model, and compresses it with those that score well enough."""

from tnlm.studies.rank_search.ranks import CANDIDATES
from tnlm.studies.rank_search.search import RankSearchResult

__all__ = ["CANDIDATES", "RankSearchResult"]
