"""Truncated SVD of every weight, without data."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="svd",
    title="truncated SVD of the weights",
    formats=("low-rank",),
    source="Eckart and Young, 1936",
)
