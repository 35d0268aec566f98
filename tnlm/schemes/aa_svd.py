"""AA-SVD: low rank fitted to dense outputs on compressed inputs, and blocks refined to match."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="aa-svd",
    title="low rank, anchored to dense outputs on compressed inputs, then refined by block",
    formats=("low-rank",),
    metric="input",
    cascade="anchored",
    refine_passes=25,
    source="AA-SVD, Sinha and Fleuret 2026, arXiv 2604.02119",
)
