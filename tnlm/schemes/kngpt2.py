"""KnGPT2's structure: one Kronecker product in every odd block and in the embedding, factor 2."""

from tnlm.schemes.base import Scheme
from tnlm.targets.matching import ODD_BLOCKS, TOKEN_EMBEDDINGS

SCHEME = Scheme(
    name="kngpt2",
    title="one Kronecker product: odd blocks and embedding, factor 2",
    formats=("kronecker", "kronecker-rows"),
    targets=(ODD_BLOCKS, TOKEN_EMBEDDINGS),
    keep_targets=0.51,  # factor 2: half the parameters, plus the small factor
    source="KnGPT2, Edalati et al. 2022, arXiv 2110.08152 (its distillation: recover='distill')",
    distillation="ilkd",
    defaults={"terms": 1},
)
