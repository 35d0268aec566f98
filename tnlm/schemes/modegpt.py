"""MoDeGPT's feed-forward module: fewer hidden channels; attention is cut as low rank.

The paper cuts rotary pairs of Q and K and head sizes of V and O as well; Transformers' attention
cannot have another head size in every block, so these matrices are whitened low rank here.
"""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="modegpt",
    title="fewer feed-forward channels (Nyström), low-rank attention",
    formats=("channels", "low-rank"),
    metric="input",
    source="MoDeGPT, Lin et al. 2024, arXiv 2408.09632 (its MLP module)",
)
