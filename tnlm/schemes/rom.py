"""LLM-ROM: the last blocks are cut one matrix after another, each fitted to its actual inputs.

As published, it uses a centered covariance without a bias; ``metric="input"`` or
``metric="centered"`` corrects this.
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
