"""Basis Sharing: two consecutive blocks share the input factor of each matrix."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="basis-sharing",
    title="whitened low rank, input factors shared by two blocks",
    formats=("low-rank",),
    metric="input",
    share=2,
    source="Basis Sharing, Wang et al. 2024, arXiv 2410.03765",
)
