"""A budget, and the front of what is possible
===========================================

How large the result is can be said in several ways; which structure is best at each size is a
matter of measuring. Here both, and a search over layers and ranks where optuna is installed. On
your own::

    python examples/budget_and_front.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy
import importlib.util

import tiny

import tnlm
from tnlm.utils.pareto import pareto as pareto_front

given = tiny.setting(__doc__)
dense = given.model

# %%
# A plan costs little, so budgets can be compared before anything is compressed. ``keep`` counts the
# whole model, ``keep_targets`` the matrices that are replaced; ``unit="macs"`` counts multiply-adds
# instead of parameters, and ``tolerance`` gives every matrix the same relative error.

BUDGETS = {
    "keep=0.8": {"keep": 0.8},
    "keep_targets=0.8": {"keep_targets": 0.8},
    "keep_targets=0.8 of macs": {"keep_targets": 0.8, "unit": "macs"},
    "tolerance=0.3": {"tolerance": 0.3},
}
for name, budget in BUDGETS.items():
    plan = tnlm.plan(dense, "svd", **budget, progress=False)
    parameters = plan.model_after.params / plan.model.params
    macs = plan.model_after.macs / plan.model.macs
    print(f"{name:25} keeps {parameters:.3f} of the parameters, {macs:.3f} of the multiply-adds")

# %%
# Three structures at several sizes: low rank, the same without the identity block that saves r * r
# parameters, and block tensor trains. ``pareto_front`` finds the points that no other point
# beats in both size and perplexity.

STRUCTURES = {
    "svd": {"scheme": "svd"},
    "svd, no gauge": {"scheme": "svd", "gauge": False},
    "btt": {"scheme": "btt"},
}

points: dict[str, list[tuple[float, float]]] = {}
for name, options in STRUCTURES.items():
    for keep in (0.9, 0.7, 0.5):
        model = tnlm.compress(copy.deepcopy(dense), **options, keep_targets=keep, progress=False)
        found = tnlm.report(model).parameters_after, given.perplexity(model)
        points.setdefault(name, []).append(found)
        print(f"{name:13} keep_targets={keep}: {found[0]} parameters, perplexity {found[1]:.2f}")
every = sorted(point for pairs in points.values() for point in pairs)
front = pareto_front(every, maximize=[False, False])
print(f"not beaten: {[every[index][0] for index in front]}")
size = sum(parameter.numel() for parameter in dense.parameters())
given.show(tnlm.plot.pareto, points, dense=(size, given.perplexity(dense)))

# %%
# Instead of one fraction for all matrices, a configuration sets which layers are decomposed, which
# matrices in them, and at which rank. All configurations together are the design space; a search
# samples it and returns its front. The model gets its own layers back after every trial.

space = tnlm.DesignSpace(dense, ranks=[8, 24], formats=["low-rank"])
print(f"{space.count(distinct=True)} configurations")
if importlib.util.find_spec("optuna"):
    objectives = {"perplexity": given.perplexity, "parameters": "params"}
    print(tnlm.search(dense, space, objectives=objectives, trials=12, progress=False))
else:
    print("for the search: pip install 'tnlm[search]'")
