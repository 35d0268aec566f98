"""Warns before a fit that looks at no data, which usually ruins a language model."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel

from tnlm.compression.job import Job
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.plans.plan import LayerPlan, Plan
from tnlm.targets.base import Target
from tnlm.utils.residency import resident

logger = logging.getLogger("tnlm")

RUINOUS = 0.1
"""Relative error of a matrix above which the warning is given."""
SAMPLES = 4
"""Number of matrices whose error is predicted, if the plan did not predict it."""


def warn_if_blind(model: PreTrainedModel, job: Job, decided: Plan) -> None:
    """Warn if a language model's weights are fitted without data, and are predicted to change much.

    A fit that looks at the weights alone spends its accuracy on directions that inputs never take.

    Args:
        model: holds the weights.
        job: the request.
        decided: the plan.
    """
    request = job.request
    changed = [layer for layer in decided.layers if layer.replaced and layer.format is not None]
    if request.looks_at_data or not model.can_generate() or not changed:
        return
    if any(parameter.is_meta for parameter in model.parameters()):
        return  # nothing is fitted: the weights are made at random
    sampled = changed[:: -(-len(changed) // SAMPLES)]
    units = {unit.name: unit for unit in (*job.units, *job.joint)}
    errors = [_error(model, job, units[layer.name], layer) for layer in sampled]
    typical = sum(errors) / len(errors)
    if typical > RUINOUS:
        logger.warning(
            "%s without data is predicted to change a matrix by %.0f %% of its norm (mean of %d of "
            "%d): %s is then usually unusable until it is trained. Pass calibration= with text "
            "(or 'self', for text that the model writes), use the scheme 'auto', keep more, or "
            "train afterwards with recover=",
            request.scheme.name,
            100 * typical,
            len(errors),
            len(changed),
            type(model).__name__,
        )


def _error(model: PreTrainedModel, job: Job, unit: Target, layer: LayerPlan) -> float:
    """Return the relative error of a decision, predicted now if it was not before."""
    if layer.error is not None:
        return layer.error
    structure = unit.taken(get_format(str(layer.format)))
    spec = from_dict(structure.spec, layer.spec)
    with resident(model, *(member.module for member in unit.members)):
        return structure.errors(unit.weight(model), job.evidence.metric(unit), [spec])[0]
