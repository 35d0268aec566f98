"""The formats of a design space, and what they cost.

On a matrix that is not reshaped, both are the truncated SVD. They differ in what is stored, and in
how the paper on the Tucker design space counts parameters.
"""

from __future__ import annotations

from typing import Any

from tnlm.decompositions import get_format
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.decompositions.tucker import TuckerSpec
from tnlm.errors import OptionError, did_you_mean
from tnlm.schemes.tucker import paper_params
from tnlm.targets.base import Target
from tnlm.tensors.network import Cost, Network

SCHEMES = {"tucker": "tucker", "low-rank": "svd"}
"""The formats of a design space, and the scheme that makes each."""


def check_form(form: str) -> None:
    """Raise `OptionError` for a format that design spaces do not support."""
    if form not in SCHEMES:
        raise OptionError(f"unknown format {form!r} of a design space{did_you_mean(form, SCHEMES)}")


def spec_of(form: str, shape: tuple[int, int], rank: int) -> TuckerSpec | LowRankSpec:
    """Return the spec of a format for a matrix that is not reshaped.

    Example:
        >>> spec_of("tucker", (6, 5), 2)
        TuckerSpec(out_split=(6,), in_split=(5,), ranks=(2, 2), gauge=False)
    """
    if form == "tucker":
        return TuckerSpec((shape[0],), (shape[1],), (rank, rank))
    return LowRankSpec(rank)


def options_of(form: str, rank: int) -> dict[str, Any]:
    """Return the options with which :func:`tnlm.compress` makes the same factors."""
    return {"ranks": [rank, rank], "gauge": False} if form == "tucker" else {"rank": rank}


def network_of(form: str, shape: tuple[int, int], rank: int) -> Network:
    """Return the network that is stored."""
    return get_format(form).network(shape, spec_of(form, shape, rank))


def shrinks(form: str, target: Target, rank: int) -> bool:
    """Return whether a rank is possible and makes a matrix smaller and no slower.

    Otherwise the matrix stays dense, as in :func:`tnlm.compress`.
    """
    if rank > min(target.shape):
        return False
    cost = stored(form, target, rank, 1)
    return cost.params <= target.most and cost.macs <= target.dense_cost(1).macs


def stored(form: str, target: Target, rank: int, itemsize: int) -> Cost:
    """Return the cost of a matrix as the library stores it."""
    return target.cost(network_of(form, target.shape, rank), itemsize)


def published(form: str, target: Target, rank: int) -> int:
    """Return the parameters as the literature counts them: no gauge, and Tucker with its core.

    Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626.

    Example:
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> matrix = MatrixTarget("q", "q", (6, 5))
        >>> [published(form, matrix, 2) for form in SCHEMES]
        [26, 22]
    """
    counted = paper_params(target.shape, rank)
    return counted if form == "tucker" else counted - rank**2
