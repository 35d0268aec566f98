"""Tucker of the reshaped weights."""

from tnlm.errors import RankError
from tnlm.schemes.base import FITTED_TO_DATA, Scheme

SCHEME = Scheme(
    name="tucker",
    title="Tucker (HOSVD, then HOOI) of the reshaped weights",
    formats=("tucker",),
    source="Tucker 1966; De Lathauwer et al. 2000; Moar et al. 2024, arXiv 2405.06626",
    with_data=FITTED_TO_DATA,
)


def paper_params(shape: tuple[int, int], rank: int) -> int:
    """Return the numbers that Moar et al. count for a plain matrix at ranks [rank, rank].

    They keep its core, which is diagonal, as a third dense layer. Ours is absorbed by a factor, so
    that a plain matrix in the ``tucker`` format stores ``rank**2`` numbers fewer.

    Args:
        shape: ``(out, in)``.
        rank: of both modes.

    Raises:
        RankError: if the matrix cannot have the rank.

    Source: Moar, Tahmasebi, Pellauer and Kwon, 2024, arXiv 2405.06626.

    Example:
        >>> paper_params((6, 5), 2)  # 2 x 5, 2 x 2 and 6 x 2
        26
    """
    if not 1 <= rank <= min(shape):
        raise RankError(
            f"rank={rank}; a {shape[0]}x{shape[1]} matrix allows 1 to {min(shape)}", argument="rank"
        )
    return rank * shape[1] + rank**2 + shape[0] * rank
