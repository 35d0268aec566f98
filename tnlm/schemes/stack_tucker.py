"""Tucker over the same matrix of two blocks or of all experts, or low rank of each."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="stack-tucker",
    title="Tucker across two blocks or all experts, or low rank of each matrix",
    formats=("stack-tucker", "expert-tucker", "low-rank"),
    metric="two-sided",
    allocation="loss",
    source="Tucker 1966; bases shared by blocks as in Basis Sharing, Wang et al. 2024, "
    "arXiv 2410.03765; multilinear whitening as in TD-MoE",
)
