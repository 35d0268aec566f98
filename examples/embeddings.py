"""Smaller embeddings
==================

In a small model the table of token embeddings is a large part. ``albert`` writes it as a product of
two thin matrices, V x E times E x H, from the trained table; ``tensorgpt`` turns every row into a
tensor train of its own. On your own model::

    python examples/embeddings.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny
import torch

import tnlm

given = tiny.setting(__doc__, kind="gpt2")
dense = given.model
table = dense.get_input_embeddings().weight.detach()
share = table.numel() / sum(parameter.numel() for parameter in dense.parameters())
print(f"the table holds {share:.2f} of the model's parameters")
print(f"dense      perplexity {given.perplexity(dense):.2f}")

# %%
# Both replace the token embedding and nothing else. Where the output head is tied to it, as in
# GPT-2, it stays tied: it multiplies by the same factors. In a train of a row of H values with k
# cores the ranks are what ``keep_targets`` allows.

models = {}
for scheme in ("albert", "tensorgpt"):
    for keep in (0.75, 0.5):
        model = tnlm.compress(copy.deepcopy(dense), scheme, keep_targets=keep, progress=False)
        models[scheme] = model
        (layer,) = tnlm.report(model).plan.layers
        print(
            f"{scheme:10} perplexity {given.perplexity(model):.2f} keeps {layer.keep:.2f}, "
            f"error {layer.error:.2f} {dict(layer.spec)}"
        )

# %%
# At the same size the two-matrix form is nearer to the table here, as all rows share one subspace;
# trains share nothing. In return, rows stay independent: editing one token's cores changes its row
# alone. A row is built when its token is looked up; the whole table never is.

embedding = models["tensorgpt"].get_input_embeddings()
print({name: tuple(value.shape) for name, value in embedding.named_parameters()})
core = next(embedding.parameters())
ids = torch.arange(10)
with torch.no_grad():
    before = embedding(ids)
    core[3].mul_(2.0)  # of the token with id 3
    changed = (embedding(ids) - before).abs().amax(1).nonzero().flatten().tolist()
    core[3].div_(2.0)
print(f"changing the cores of row 3 changes rows {changed}")

# %%
# Why two thin matrices suffice: the leading directions of the table hold most of its energy.

energies = torch.linalg.svdvals(table.float()).square().tolist()
given.show(tnlm.plot.energy, {"token embedding": energies})
