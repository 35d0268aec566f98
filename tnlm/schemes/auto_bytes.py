"""auto-bytes: structure, size and bits of every matrix under one budget of bytes."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="auto-bytes",
    title="our best in bytes: low rank, fewer channels or dense, each in the bits that pay",
    formats=("low-rank", "channels"),
    metric="two-sided",
    allocation="loss",
    precision="auto",
    group=128,
    keep_targets=0.25,
    unit="bytes",
    source="tnlm; the hull of auto with the bits of GPTQ, one Lagrangian allocation",
)
