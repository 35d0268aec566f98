"""auto: what holds quality best at a given size, by measurement."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="auto",
    title="our best: two-sided metric, one loss-aware budget, dense where that is best",
    formats=("low-rank",),
    metric="two-sided",
    allocation="loss",
    source="tnlm; its parts are K-FAC whitening, Lagrangian allocation and gauge-fixed storage",
)
