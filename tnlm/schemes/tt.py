"""Tensor train (matrix product operator) of the weights."""

from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="tt",
    title="tensor train (MPO) of the weights",
    formats=("tensor-train",),
    source="Oseledets 2011; Novikov et al. 2015, arXiv 1509.06569",
    with_data=FITTED_TO_DATA,
)
