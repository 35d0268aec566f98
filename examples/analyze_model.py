"""What a model's matrices look like
=================================

Before a structure is chosen: how fast singular values fall, how many directions the outputs use on
real text, and which singular values the model would miss. The model is left as it was. On your
own::

    python examples/analyze_model.py --model MODEL --text TEXT
"""

from __future__ import annotations

import tiny

import tnlm

given = tiny.setting(__doc__)

# %%
# One row for each matrix. ``k90`` is the fraction of the directions that hold 90 % of the energy,
# and ``random`` the same for a matrix of independent random numbers: where the two agree, plain low
# rank has nothing to exploit. ``features k90`` counts directions of the outputs on the text, often
# far fewer, which is why schemes that use data do better.

data = {
    "calibration": [given.learn],
    "tokenizer": given.tokenizer,
    "num_samples": 32,
    "max_length": given.window,
    "progress": False,
}
analysis = tnlm.analyze(given.model, **data)
print(analysis)

# %%
# ``curves`` holds the error of every format at many sizes, in the Frobenius norm (``identity``) and
# in the norm of the outputs (``input``). The last matrix alone, at about half its parameters:

name = analysis.weights[-1].name
one = tnlm.analyze(given.model, targets=[name], formats=["low-rank", "kronecker"], **data)
for metric in ("identity", "input"):
    for structure in ("low-rank", "kronecker"):
        mine = [row for row in one.curves if (row.format, row.metric) == (structure, metric)]
        row = min(mine, key=lambda row: abs(row.keep - 0.5))
        print(f"{name} {structure:9} {metric:8} keep {row.keep:.2f} error {row.error:.3f}")

# %%
# Which matrices will suffer most? The fraction that is removed times the stable rank predicts it,
# without any text. In the picture a row is a kind of matrix, a column a block.

damage = analysis.damage(keep=0.8)
print("suffers most:", max(damage, key=damage.__getitem__))
given.show(tnlm.plot.heatmap, damage, label="predicted damage")

# %%
# Do large singular values matter more? Each tenth of them in turn is dropped from all matrices, and
# the model is measured without it. If they do, the first group costs most, and the rank correlation
# with the lost energy is near 1.

groups = tnlm.truncate_groups(
    given.model,
    given.measure,
    tokenizer=given.tokenizer,
    window=given.window,
    windows=8,
    progress=False,
)
print(groups)
