"""SVD-LLM v2: whitened low rank, with ranks allocated within each type of matrix."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="svd-llm-v2",
    title="whitened low rank, ranks by truncation loss within a type",
    formats=("low-rank",),
    metric="input",
    allocation="truncation",
    source="SVD-LLM V2, Wang et al. 2025, arXiv 2503.12340",
)
