"""LLM Surgeon: rows and columns of all matrices removed in several shots under K-FAC."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="llm-surgeon",
    title="rows and columns of least loss removed in several shots, the rest updated (K-FAC)",
    formats=("submatrix",),
    metric="surgery",
    allocation="surgery",
    source="LLM Surgeon, van der Ouderaa et al. 2024, arXiv 2312.17244",
)
