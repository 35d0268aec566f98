"""LLM-ROM: the last blocks are cut one matrix after another, each to its real inputs.

As published: centred covariance, no bias. ``metric="input"`` or ``metric="centered"`` corrects it.
"""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="rom",
    title="low rank of the features, last blocks, one after another",
    formats=("low-rank",),
    metric="covariance",
    allocation="last",
    cascade="sequential",
    source="LLM-ROM, Chavan et al. 2023, arXiv 2312.07046",
    defaults={"gauge": False},
)
