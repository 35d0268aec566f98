"""Shapeshifter: every matrix as a sum of Kronecker products, here from trained weights."""

from tnlm.schemes.base import Scheme
from tnlm.targets.matching import ALL_LINEAR, EMBEDDINGS

SCHEME = Scheme(
    name="shapeshifter",
    title="sums of Kronecker products everywhere, from trained weights",
    formats=("kronecker", "kronecker-rows"),
    targets=(ALL_LINEAR, EMBEDDINGS),
    source="Shapeshifter, Panahi et al. 2021, NeurIPS (there trained from scratch)",
)
