"""LoRA-weighted SVD: input features weighted by importance estimated from a LoRA's gradients."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="lora-svd",
    title="low rank, input features weighted by Fisher information estimated with a LoRA",
    formats=("low-rank",),
    metric="lora-fisher",
    source=(
        "Moskovskiy et al., NLDB 2025, Memory Efficient LM Compression using Fisher Information "
        "from Low-Rank Representations; and tnlm's own proposal"
    ),
)
