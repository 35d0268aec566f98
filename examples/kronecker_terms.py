r"""Sums of Kronecker products
==========================

``scheme="kron"`` writes a matrix as a sum of Kronecker products, :math:`W = \sum_t A_t \otimes
B_t`. Two choices decide its size: the number of terms and the shape of the inner factor. With
``terms=4`` alone tnlm searches the shapes. On your own model::

    python examples/kronecker_terms.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny

import tnlm
from tnlm.studies.analysis import kronecker_errors

given = tiny.setting(__doc__)
print(f"dense              perplexity {given.perplexity(given.model):.2f}")

# %%
# Four terms in every matrix. The plan shows the two splits that the search chose: a matrix of
# ``out_split`` (p, r) times ``in_split`` (q, s) has outer factors of p x q and inner ones of r x s.

plan = tnlm.plan(given.model, "kron", terms=4, progress=False)
for layer in plan.layers[:3]:
    print(layer.name, layer.spec, f"keeps {layer.keep:.2f}, error {layer.error:.2f}")
four = tnlm.compress(copy.deepcopy(given.model), plan, progress=False)
print(f"4 terms            perplexity {given.perplexity(four):.2f}")

# %%
# This is the sum nearest to the weights; on a real model it is unusable without training, as the
# README's table shows. ``metric="input"`` fits the sum to the outputs on a text instead. With a
# budget in place of ``terms``, the search chooses both terms and shape.

nearest = tnlm.compress(copy.deepcopy(given.model), "kron", keep_targets=0.7, progress=False)
print(f"keep 0.7, no data  perplexity {given.perplexity(nearest):.2f}")
aware = tnlm.compress(
    copy.deepcopy(given.model),
    "kron",
    metric="input",
    keep_targets=0.7,
    calibration=[given.learn],
    tokenizer=given.tokenizer,
    num_samples=64,
    max_length=given.window,
    progress=False,
)
print(f"keep 0.7, data     perplexity {given.perplexity(aware):.2f}")

# %%
# The shape is searched because the error at a given size depends on it. Here every inner shape gets
# as many terms as half the matrix's parameters allow.

name = plan.layers[0].name
errors = kronecker_errors(given.model.get_submodule(name).weight, keep=0.5)
best, worst = min(errors, key=errors.__getitem__), max(errors, key=errors.__getitem__)
print(f"{name}: error {errors[best]:.2f} with inner factors of {best[0]}x{best[1]},")
print(f"{errors[worst]:.2f} with {worst[0]}x{worst[1]}, of {len(errors)} shapes")
given.show(tnlm.plot.shapes, errors)
