"""Ranks by trial: rank search
===========================

Instead of using a formula, the search measures the model. From the last matrix to the first, it
tries ranks in ascending order and keeps the first at which the model still scores well enough
(SFSD, Chavan et al. 2024, arXiv 2405.13039). On your own model::

    python examples/rank_search.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny

import tnlm

given = tiny.setting(__doc__)
cut = len(given.measure) // 2

# %%
# Three texts that do not overlap: one calibrates the fits, one decides, and the result is reported
# on the third. The perplexity may grow by the factor ``growth`` per matrix tried. Each matrix is
# fitted once; smaller ranks are slices of that fit.

common = {
    "search": [given.measure[:cut][:2000]],
    "report": [given.measure[cut:][:2000]],
    "calibration": [given.learn],
    "tokenizer": given.tokenizer,
    "num_samples": 32,
    "max_length": given.window,
    "candidates": [0.3, 0.6, 0.9],
    "progress": False,
}
model = copy.deepcopy(given.model)
found = tnlm.rank_search(model, "perplexity", growth=1.01, **common)
print(found)

# %%
# A tolerance does not determine the size of the result. With ``keep``, every rank of every matrix
# is measured alone, and the ranks that cost least per parameter saved are chosen until the whole
# model is small enough. No tolerance applies then.

model = copy.deepcopy(given.model)
small = tnlm.rank_search(model, "perplexity", keep=0.8, **common)
share = small.plan.model_after.params / small.plan.model.params
print(f"with a budget: {share:.3f} of the parameters, {len(small.trials)} trials")
print(f"perplexity {small.report[0]:.2f} dense, {small.report[1]:.2f} compressed")

# %%
# Where the first search cut most: the fraction of its parameters that each matrix keeps.

kept = {layer.name: layer.keep for layer in found.plan.layers}
print(f"least: {min(kept, key=kept.__getitem__)}, most: {max(kept, key=kept.__getitem__)}")
given.show(tnlm.plot.heatmap, kept, label="fraction kept")
