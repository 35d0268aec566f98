"""Ranks by trial: surgical search
===============================

Instead of a formula a search asks the model. From the last matrix to the first it tries ranks from
the smallest on, and keeps the first with which the model is still good enough (SFSD, Chavan et al.
2024, arXiv 2405.13039). On your own model::

    python examples/surgical_search.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny

import tnlm

given = tiny.setting(__doc__, "figure")
cut = len(given.measure) // 2

# %%
# Three texts that share nothing: one calibrates the fits, one decides, and one tells the result.
# With every matrix that is tried the perplexity may grow by the factor ``growth``. Each matrix is
# fitted once; a smaller rank is a slice of a larger one.

common = {
    "search": [given.measure[:cut][:4000]],
    "report": [given.measure[cut:][:4000]],
    "calibration": [given.learn],
    "tokenizer": given.tokenizer,
    "num_samples": 32,
    "max_length": given.window,
    "candidates": [0.3, 0.6, 0.9],
    "progress": False,
}
model = copy.deepcopy(given.model)
found = tnlm.surgical_search(model, "perplexity", growth=1.01, **common)
print(found)

# %%
# A tolerance says nothing about the size of the result. With ``keep`` every rank of every matrix is
# measured by itself, and those of least damage for each number saved are taken until the whole
# model is small enough; then no tolerance holds.

model = copy.deepcopy(given.model)
small = tnlm.surgical_search(model, "perplexity", keep=0.8, **common)
share = small.plan.model_after.params / small.plan.model.params
print(f"with a budget: {share:.3f} of the parameters, {len(small.trials)} trials")
print(f"perplexity {small.report[0]:.2f} dense, {small.report[1]:.2f} compressed")

# %%
# Where the first search cut most: the share of its numbers that each matrix keeps.

kept = {layer.name: layer.keep for layer in found.plan.layers}
print(f"least: {min(kept, key=kept.__getitem__)}, most: {max(kept, key=kept.__getitem__)}")
if given.figure:
    given.save(tnlm.plot.heatmap(kept, label="share kept"))
