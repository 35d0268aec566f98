"""LPAF: movement pruning, then low rank of the pruned weights, then mixed-rank fine-tuning."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="lpaf",
    title="low rank of movement-pruned weights, mixed-rank fine-tuning",
    formats=("low-rank",),
    metric="movement",
    recover="mixed-rank",
    source="LPAF, Ren and Zhu 2023, arXiv 2306.14152",
)
