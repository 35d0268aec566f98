"""FWSVD: input features weighted by the Fisher information of their weights."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="fwsvd",
    title="low rank, input features weighted by Fisher information",
    formats=("low-rank",),
    metric="fisher-inputs",
    source="FWSVD, Hsu et al. 2022, arXiv 2207.00112",
)
