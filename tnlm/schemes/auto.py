"""auto: what holds quality best at a given size, by measurement."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="auto",
    title="our best: low rank, fewer channels or dense, whichever harms the loss least",
    formats=("low-rank", "channels"),
    metric="two-sided",
    allocation="loss",
    source="tnlm; K-FAC whitening, MoDeGPT channels, Lagrangian allocation, gauge-fixed storage",
)
