"""auto: the combination with the best measured quality at a given size."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="auto",
    title="our best: low rank, fewer channels or heads, Tucker of experts, by least predicted loss",
    formats=("low-rank", "channel-ranks", "channels", "heads", "expert-tucker"),
    metric="two-sided",
    allocation="loss",
    source="tnlm; K-FAC whitening, MoDeGPT channels, Lagrangian allocation, gauge-fixed storage",
)
