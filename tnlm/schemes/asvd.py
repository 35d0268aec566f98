"""ASVD: columns weighted by the magnitude of their inputs."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="asvd",
    title="low rank, columns weighted by mean input magnitude",
    formats=("low-rank",),
    metric="diagonal",
    source="ASVD, Yuan et al. 2023, arXiv 2312.05821 (alpha = 0.5; ranks uniform, not searched)",
)
