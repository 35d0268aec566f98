"""REAP: drop the experts that add least, as many in every block."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="reap",
    title="fewer experts: those of least gate times output norm go",
    formats=("experts",),
    metric="reap",
    targets="experts",
    source="REAP, Lasby et al. 2025, arXiv 2510.13999",
)
