"""Tucker of the reshaped weights."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="tucker",
    title="Tucker (HOSVD, then HOOI) of the reshaped weights",
    formats=("tucker",),
    source="Tucker 1966; De Lathauwer et al. 2000; Moar et al. 2024, arXiv 2405.06626",
)
