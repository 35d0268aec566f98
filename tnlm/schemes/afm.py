"""AFM: low rank of the features, with the mean feature in a bias."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="afm",
    title="low rank of the centered features, with a bias",
    formats=("low-rank",),
    metric="centered",
    source="AFM, Yu and Wu 2023, AAAI (its sensitivity score is not published: uniform)",
)
