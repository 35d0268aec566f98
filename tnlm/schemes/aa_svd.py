"""AA-SVD: low rank fitted to the dense model's outputs on the compressed model's inputs."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="aa-svd",
    title="low rank, anchored to dense outputs on compressed inputs",
    formats=("low-rank",),
    metric="input",
    cascade="anchored",
    source="AA-SVD, Sinha and Fleuret 2026, arXiv 2604.02119 (its refinement is refine=)",
)
