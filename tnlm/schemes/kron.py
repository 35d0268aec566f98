"""Sum of Kronecker products; splits are searched if none are given."""

from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="kron",
    title="sum of Kronecker products, nearest to the weights",
    formats=("kronecker",),
    source="Van Loan and Pitsianis 1993; KnGPT2, Edalati et al. 2022, arXiv 2110.08152",
    with_data=FITTED_TO_DATA,
)
