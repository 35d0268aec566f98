"""gptq: bits alone, each column's error of rounding made up for by later columns."""

from tnlm.schemes.base import Scheme

SCHEME = Scheme(
    name="gptq",
    title="bits alone: rounded with error feedback (GPTQ)",
    formats=(),
    metric="input",
    precision="int4",
    source="GPTQ, Frantar et al. 2022, arXiv 2210.17323",
)
