"""With data and without
=====================

The same structure, the same size, three ways to measure the error: of the weights (``svd``), of the
outputs on a text (``svd-llm``), and by the effect on the loss (``kfac-svd``). On your own model::

    python examples/data_aware.py --model MODEL --text TEXT

The page on quality, ``docs/benchmarks/quality.md``, has such figures of a real model.
"""

from __future__ import annotations

import copy
import tempfile

import tiny

import tnlm

given = tiny.setting(__doc__)
dense = given.model
print(f"dense                   perplexity {given.perplexity(dense):.2f}")

# %%
# ``svd`` needs no data; the others calibrate on a text, and ``kfac-svd`` also computes gradients on
# its first windows. Statistics of the text are kept in ``cache_dir``, so that all compressions
# share them.

place = tempfile.TemporaryDirectory()
data = {
    "calibration": [given.learn],
    "tokenizer": given.tokenizer,
    "num_samples": 64,
    "max_length": given.window,
    "cache_dir": place.name,
    "progress": False,
}
KEEPS = (0.8, 0.6, 0.4)
points: dict[str, list[tuple[float, float]]] = {}
for scheme in ("svd", "svd-llm", "kfac-svd"):
    for keep in KEEPS:
        needed = {"progress": False} if scheme == "svd" else data
        model = tnlm.compress(copy.deepcopy(dense), scheme, keep_targets=keep, **needed)
        size, found = tnlm.report(model).parameters_after, given.perplexity(model)
        points.setdefault(scheme, []).append((size, found))
        print(f"{scheme:8} keep_targets={keep} perplexity {found:.2f}")

# %%
# ``metric=`` overrides the metric of any scheme, so that one choice is changed at a time. This is
# ``svd`` with the metric of ``svd-llm``, the only difference between the two.

same = tnlm.compress(copy.deepcopy(dense), "svd", metric="input", keep_targets=0.4, **data)
print(f"svd, metric=input keep_targets=0.4 perplexity {given.perplexity(same):.2f}")

# %%
# Perplexity against size. The tiny model was trained for seconds, so its differences say little
# about real models; the script prints and draws the same for those.

size = sum(parameter.numel() for parameter in dense.parameters())
given.show(tnlm.plot.pareto, points, dense=(size, given.perplexity(dense)))
place.cleanup()
