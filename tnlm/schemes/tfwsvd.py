"""TFWSVD: every entry weighted by its own Fisher information."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="tfwsvd",
    title="low rank, every entry weighted by Fisher information (ALS)",
    formats=("low-rank",),
    metric="fisher-elements",
    source="TFWSVD, Hua et al. 2022, arXiv 2211.09718",
)
