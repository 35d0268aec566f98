"""LoRA-weighted SVD: input features weighed by what a LoRA's gradients tell of their importance."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="lora-svd",
    title="low rank, input features weighed by Fisher information seen through a LoRA",
    formats=("low-rank",),
    metric="lora-fisher",
    source=(
        "Moskovskiy et al., NLDB 2025, Memory Efficient LM Compression using Fisher Information "
        "from Low-Rank Representations; and tnlm's own proposal"
    ),
)
