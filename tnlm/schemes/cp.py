"""CP of the weights: a sum of rank-one terms of the reshaped matrix."""

from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="cp",
    title="sum of rank-one terms (CP) of the reshaped weights",
    formats=("cp",),
    source="Hitchcock 1927; Carroll and Chang 1970; Harshman 1970; Lebedev et al. 2015, "
    "arXiv 1412.6553",
    with_data=FITTED_TO_DATA,
)
