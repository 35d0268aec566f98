"""Block tensor train: every block of the matrix has low rank; splits are searched."""

from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="btt",
    title="block tensor train (Monarch), nearest to the weights",
    formats=("block-train",),
    source="Monarch, Dao et al. 2022, arXiv 2204.00595; BTT, Qiu et al. 2024, arXiv 2406.06248",
    with_data=FITTED_TO_DATA,
)
