"""SFSD: low rank of the features, with the bias of its formula."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="sfsd",
    title="low rank of the centered features, with the correct bias",
    formats=("low-rank",),
    metric="centered",
    allocation="last",
    source="SFSD, Chavan et al. 2024, arXiv 2405.13039 (the formula's bias: its code's is zero)",
    defaults={"gauge": False},
)
