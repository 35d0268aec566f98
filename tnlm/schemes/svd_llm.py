"""Whitened low rank: the least output error on calibration data."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="svd-llm",
    title="low rank with the least output error on data (whitening)",
    formats=("low-rank",),
    metric="input",
    source="SVD-LLM, Wang et al. 2024, arXiv 2403.07378",
)
