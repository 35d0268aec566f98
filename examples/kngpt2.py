"""KnGPT2: half of a GPT-2, taught by the whole
============================================

Every second block and the embedding become single Kronecker products, half as large. The compressed
model then learns its teacher's embeddings, attention maps and feed-forward outputs beside the
labels (Edalati et al. 2022, arXiv 2110.08152). On your own GPT-2-like model::

    python examples/kngpt2.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy

import tiny

import tnlm

given = tiny.setting(__doc__, "tokens", kind="gpt2")
teacher = given.model
print(f"teacher    perplexity {given.perplexity(teacher):.2f}")

# %%
# GPT-2 holds queries, keys and values in one matrix, ``c_attn``; tnlm treats them as three. The
# report lists what the scheme chose: the odd blocks, and the embedding as a product whose rows stay
# whole.

student = tnlm.compress(copy.deepcopy(teacher), "kngpt2", progress=False)
report = tnlm.report(student)
print(report)
print(f"compressed perplexity {given.perplexity(student):.2f}")

# %%
# A single product fitted without data loses much. ``preset="ilkd"`` is the paper's
# intermediate-layer distillation. The paper does not give the weights of its losses; here each
# is 1.

tnlm.distill(
    student,
    teacher,
    [given.learn],
    preset="ilkd",
    tokenizer=given.tokenizer,
    tokens=given.tokens,
    batch_size=given.batch,
    max_length=given.window,
    learning_rate=5e-5 if given.real else 2e-3,
    progress=False,
)
print(f"distilled  perplexity {given.perplexity(student):.2f}")

# %%
# The teacher was not changed, and the student is as small as before.

print(f"teacher    perplexity {given.perplexity(teacher):.2f}")
kept, dense = (sum(p.numel() for p in model.parameters()) for model in (student, teacher))
print(f"{kept / dense:.3f} of the parameters")
given.show(tnlm.plot.allocation, report)
