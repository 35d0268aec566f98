"""A first compression
===================

A plan, a compressed model, a report, and a directory that loads again: what most uses of tnlm
need. By default it runs on a tiny model that is made here. On your own::

    python examples/first_compression.py --model MODEL --text TEXT

MODEL is a directory, a .gguf file or a hub id. The first half of TEXT calibrates and the second
half measures.
"""

from __future__ import annotations

import tempfile

import tiny

import tnlm

given = tiny.setting(__doc__)
model, tokenizer = given.model, given.tokenizer
place = tempfile.TemporaryDirectory()
print(f"dense      perplexity {given.perplexity(model):.2f}")

# %%
# A plan previews what happens to each matrix: its cost, and the expected error. No weight changes
# yet. ``svd-llm`` keeps the part of each matrix that its inputs on the calibration text use most;
# ``keep_targets`` is the fraction of the matrices' parameters to keep. Statistics of the text are
# stored in ``cache_dir``, so that they are gathered once.

data = {
    "calibration": [given.learn],
    "tokenizer": tokenizer,
    "num_samples": 32,
    "max_length": given.window,
    "cache_dir": f"{place.name}/statistics",
    "progress": False,
}
plan = tnlm.plan(model, "svd-llm", keep_targets=0.7, **data)
print(plan)

# %%
# Carrying out the plan changes the model in place; if anything fails, the model is unchanged. The
# report has the columns of the plan, with measured errors instead of predicted ones.

model = tnlm.compress(model, plan, **data)
report = tnlm.report(model)
print("\n".join(report.summary()))
print(f"compressed perplexity {given.perplexity(model):.2f}")

# %%
# The parameters that each block keeps, of those it had.

given.show(tnlm.plot.allocation, report)

# %%
# The result is an ordinary model: it generates, saves and loads.

tnlm.save(model, f"{place.name}/smaller", tokenizer=tokenizer)
loaded = tnlm.load(f"{place.name}/smaller")
print(f"loaded     perplexity {given.perplexity(loaded):.2f}")
prompt = tokenizer("The value of", return_tensors="pt")
ids = loaded.generate(**prompt, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(ids[0]))
place.cleanup()
