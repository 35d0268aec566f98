"""Tucker over the same matrix of two blocks, or low rank of each, whichever harms the loss less."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="stack-tucker",
    title="Tucker across two blocks, or low rank of each matrix",
    formats=("stack-tucker", "low-rank"),
    metric="two-sided",
    allocation="loss",
    source="Tucker 1966; bases shared by blocks as in Basis Sharing, Wang et al. 2024, "
    "arXiv 2410.03765; multilinear whitening as in TD-MoE",
)
