"""TensorGPT: every token embedding as its own matrix product state."""

from tnlm.schemes.base import Scheme
from tnlm.targets.matching import TOKEN_EMBEDDINGS

SCHEME = Scheme(
    name="tensorgpt",
    title="one matrix product state per token embedding",
    formats=("token-mps",),
    targets=TOKEN_EMBEDDINGS,
    source="TensorGPT, Xu et al. 2023, arXiv 2307.00526",
    with_data={"metric": "tokens"},
)
