"""SVD weighted by a LoRA, and healed by one
=========================================

A LoRA's gradients show which inputs of a matrix matter to the loss, without the gradient of the
matrix itself. ``lora-svd`` weights an SVD by them; then another LoRA wins back part of the loss.
It needs ``pip install 'tnlm[train]'``. On your own model::

    python examples/lora_weighted_svd.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny

import tnlm

given = tiny.setting(__doc__, "tokens")
dense = given.model
print(f"dense                 perplexity {given.perplexity(dense):.2f}")

# %%
# Low rank whose columns are weighted by a LoRA's estimate of their Fisher information, beside plain
# low rank of the same size. Measure which is better on your model: one weight for each input says
# less than a metric with whole second moments.

data = {"tokenizer": given.tokenizer, "max_length": given.window, "progress": False}
plain = tnlm.compress(copy.deepcopy(dense), "svd", keep_targets=0.5, progress=False)
print(f"svd                   perplexity {given.perplexity(plain):.2f}")
model = tnlm.compress(
    copy.deepcopy(dense),
    "lora-svd",
    keep_targets=0.5,
    calibration=[given.learn],
    num_samples=64,
    gradient_samples=64,
    **data,
)
print(f"lora-svd              perplexity {given.perplexity(model):.2f}")

# %%
# A LoRA on each factor, all else frozen. It is merged at the end, so that ranks, parameters and the
# identity block of the gauge do not change.

training = {
    "tokens": given.tokens,
    "batch_size": given.batch,
    "learning_rate": 2e-4 if given.real else 2e-3,
}
healed = tnlm.heal(copy.deepcopy(model), [given.learn], **training, **data)
print(f"healed on the factors perplexity {given.perplexity(healed):.2f}")

# %%
# Or a LoRA beside each product, to compensate for its error: it starts from the part of the dense
# weight that the product lacks, is trained, and is then joined to the factors, so that the rank
# grows by the LoRA's. The report counts the added parameters.

weights = {
    layer.name: dense.get_submodule(layer.name).weight.detach()
    for layer in tnlm.report(model).plan.layers
    if layer.format
}
beside = tnlm.heal(
    copy.deepcopy(model),
    [given.learn],
    on="layers",
    rank=4,
    alpha=4.0,
    start="residual",
    originals=weights,
    merge="concatenate",
    **training,
    **data,
)
print(f"compensated           perplexity {given.perplexity(beside):.2f}")
for name, made in (("lora-svd", model), ("healed", healed), ("compensated", beside)):
    print(f"{name:12} {tnlm.report(made).parameters_after} parameters")

# %%
# Perplexity against size, of all four.

made = {"svd": plain, "lora-svd": model, "healed": healed, "compensated": beside}
points = {
    name: [(tnlm.report(each).parameters_after, given.perplexity(each))]
    for name, each in made.items()
}
given.show(tnlm.plot.pareto, points)
