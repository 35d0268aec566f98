"""A format of your own
====================

A format is one object: it names a tensor network, fits it, and lists the sizes worth trying. Cost,
execution, gradients, saving and loading follow from the network. This one is low rank head by head:
every group of consecutive rows has a product of its own. On your own model::

    python examples/own_format.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tiny
import torch
from torch import Tensor

import tnlm
from tnlm.decompositions.als import als
from tnlm.decompositions.base import Ceiling, Format, Shape, matrix_shape
from tnlm.errors import RankError
from tnlm.metrics.metric import Metric
from tnlm.schemes.base import Scheme
from tnlm.tensors.network import Factors, Network

# %%
# The spec is what a checkpoint stores: whole numbers and lists of them, in a frozen dataclass.


@dataclass(frozen=True)
class HeadsSpec:
    """How many groups of rows there are, and the rank of each."""

    heads: int
    rank: int


# %%
# In the network ``hor,hri->hoi`` the mode h, which numbers the groups, is in both factors and in
# the rows: a group of one factor meets only the same group of the other.


class Heads(Format[HeadsSpec]):
    """A truncated SVD of every group of consecutive rows."""

    name = "head-wise"
    title = "low rank, one product for each group of rows"
    spec = HeadsSpec
    metrics = frozenset({"identity", "separable", "elementwise"})

    def network(self, shape: Shape, spec: HeadsSpec) -> Network:
        """Return the network, or say what the matrix can have."""
        rows = shape[0] // spec.heads
        if shape[0] % spec.heads or spec.rank > min(rows, shape[1]):
            raise RankError(f"{spec} does not fit a {shape[0]}x{shape[1]} matrix")
        sizes = {"h": spec.heads, "o": rows, "r": spec.rank, "i": shape[1]}
        return Network({"left": "hor", "right": "hri"}, "ho", "i", sizes)

    def fit(self, weight: Tensor, metric: Metric, spec: HeadsSpec) -> Factors:
        """Fit each group under the side of the inputs, and improve all of them under the rest."""
        shared = Metric(inputs=metric.start().inputs)
        groups = weight.detach().double().chunk(spec.heads)
        fitted = [shared.low_rank(group, spec.rank) for group in groups]
        left, right = (torch.stack(factors) for factors in zip(*fitted, strict=True))
        start = {"left": left, "right": right}
        if metric.separable and metric.outputs is None:  # then groups do not meet in the error
            return start
        return als(self.network(matrix_shape(weight), spec), weight, metric, start).factors

    def candidates(
        self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling
    ) -> Sequence[HeadsSpec]:
        """Return the largest rank within the budget, for each number of groups allowed."""
        wanted = [options["heads"]] if options.get("heads") else [2, 4]
        found = []
        for heads in (h for h in wanted if shape[0] % h == 0):
            ranks = range(min(shape[0] // heads, shape[1]), 0, -1)
            specs = (HeadsSpec(heads, rank) for rank in ranks)
            found += [s for s in specs if ceiling.allows(self.network(shape, s))][:1]
        return found

    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[HeadsSpec]:
        """Return the smallest sizes, a twentieth apart, whose error is within the tolerance."""
        for step in range(1, 21):
            ceiling = Ceiling(params=step / 20 * weight.numel())
            specs = self.candidates(matrix_shape(weight), options, ceiling)
            errors = self.errors(weight, metric, specs)
            good = [s for s, e in zip(specs, errors, strict=True) if e <= tolerance]
            if good:
                return good
        return []


# %%
# Inside the library, a format is a file in ``tnlm/decompositions/`` that ends with ``FORMAT =
# Heads()``, a scheme one in ``tnlm/schemes/``, and both are found by themselves. Outside, they are
# registered; a checkpoint then loads only where they are registered too.

tnlm.register(Heads())
tnlm.register(
    Scheme(
        name="head-wise",
        title="low rank head by head",
        formats=("head-wise",),
        targets=r".*(q_proj|k_proj|v_proj)",
        source="this example",
    )
)

# %%
# It is used like any other: planned, fitted under a metric, saved, loaded, exported.

given = tiny.setting(__doc__)
data = {"calibration": [given.learn], "tokenizer": given.tokenizer, "max_length": given.window}
print(f"dense       perplexity {given.perplexity(given.model):.2f}")
for metric in ("identity", "input", "two-sided"):
    needed = {} if metric == "identity" else data
    model = tnlm.compress(
        copy.deepcopy(given.model),
        "head-wise",
        metric=metric,
        keep_targets=0.4,
        **needed,
        progress=False,
    )
    print(f"{metric:11} perplexity {given.perplexity(model):.2f}")
report = tnlm.report(model)
print(report)
with tempfile.TemporaryDirectory() as folder:
    loaded = tnlm.load(tnlm.save(model, f"{folder}/head-wise"))
print(f"loaded      perplexity {given.perplexity(loaded):.2f}")
print(f"dense again perplexity {given.perplexity(tnlm.to_dense(loaded)):.2f}")
given.show(tnlm.plot.heatmap, report, label="fraction kept")
