"""MoDeGPT's feed-forward module: fewer hidden channels; attention matrices get low rank.

The paper also cuts rotary pairs of Q and K and head sizes of V and O. In transformers, head sizes
cannot differ between blocks, so these matrices get whitened low rank here.
"""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="modegpt",
    title="fewer feed-forward channels (Nyström), low-rank attention",
    formats=("channels", "low-rank"),
    metric="input",
    source="MoDeGPT, Lin et al. 2024, arXiv 2408.09632 (its MLP module)",
)
