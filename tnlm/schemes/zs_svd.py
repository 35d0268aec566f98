"""ZS-SVD: whitened low rank, with components dropped by the first-order change of the loss."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="zs-svd",
    title="whitened low rank, components dropped so that predicted changes of the loss sum to zero",
    formats=("low-rank",),
    metric="sloped-input",
    allocation="zero-sum",
    source="ZS-SVD, Abbasi et al. 2026, arXiv 2602.02848",
)
