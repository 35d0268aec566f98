"""A first compression
===================

A plan, a compressed model, a report, and a directory that loads again: the four things that most
uses of tnlm need. By default all of it happens on a tiny model that is made here. On your own::

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
# A plan says what would be done to each matrix, what that costs and what error is expected. No
# weight changes yet. ``svd-llm`` keeps, of each matrix, what its inputs on the calibration text
# make most use of; ``keep_targets`` is the share of the matrices' numbers that remains. What the
# text tells is kept in ``cache_dir``, so that it is read once.

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
# Carrying it out changes the model in place. If anything failed the model would be left as it was.
# The report has the columns of the plan, with errors that were measured instead of predicted.

model = tnlm.compress(model, plan, **data)
report = tnlm.report(model)
print("\n".join(report.summary()))
print(f"compressed perplexity {given.perplexity(model):.2f}")

# %%
# The result is an ordinary model: it generates, and it saves and loads whole.

tnlm.save(model, f"{place.name}/smaller", tokenizer=tokenizer)
loaded = tnlm.load(f"{place.name}/smaller")
print(f"loaded     perplexity {given.perplexity(loaded):.2f}")
prompt = tokenizer("The value of", return_tensors="pt")
ids = loaded.generate(**prompt, max_new_tokens=12, do_sample=False)
print(tokenizer.decode(ids[0]))
place.cleanup()
