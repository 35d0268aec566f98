"""Tensor ring of the weights: a tensor train closed by one more bond."""

from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="tr",
    title="tensor ring of the weights",
    formats=("tensor-ring",),
    source="Zhao et al. 2016, arXiv 1606.05535",
    with_data=FITTED_TO_DATA,
)
