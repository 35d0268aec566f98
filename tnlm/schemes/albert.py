"""ALBERT's factorized embedding, V x E times E x H, from the trained table by SVD."""

from tnlm.schemes.base import Scheme
from tnlm.targets.matching import TOKEN_EMBEDDINGS

SCHEME = Scheme(
    name="albert",
    title="factorized embedding, V x E times E x H",
    formats=("low-rank",),
    targets=TOKEN_EMBEDDINGS,
    source="ALBERT, Lan et al. 2020, arXiv 1909.11942 (there trained from scratch)",
    defaults={"gauge": False},
    with_data={"metric": "tokens"},
)
