"""KFAC-SVD: errors weighted by inputs and by output gradients."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="kfac-svd",
    title="low rank, whitened by inputs and output gradients",
    formats=("low-rank",),
    metric="two-sided",
    source="KFAC-SVD, as OBD-LLM (arXiv 2604.00821) and IO-SVD (arXiv 2605.15626)",
)
