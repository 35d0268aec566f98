"""rtn: every weight rounded to the nearest code, without data."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="rtn",
    title="bits alone: every weight rounded to the nearest code",
    formats=(),
    precision="int8",
    source="the baseline of GPTQ, Frantar et al. 2022, arXiv 2210.17323; scales by search",
)
