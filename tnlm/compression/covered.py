"""Adds to a plan what it leaves as it is."""

from __future__ import annotations

import logging
from dataclasses import replace

from transformers import PreTrainedModel

from tnlm.plans.plan import Plan
from tnlm.targets.coverage import coverage
from tnlm.targets.selection import Selection

logger = logging.getLogger("tnlm")


def with_coverage(model: PreTrainedModel, selection: Selection, decided: Plan) -> Plan:
    """Return a plan that lists what it leaves, and warn where that is much of the body.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from tnlm.targets.selection import select
        >>> from tnlm.tensors.network import Cost
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                                      num_hidden_layers=1, num_attention_heads=2))
        >>> decided = Plan("svd", "identity", {}, (), Cost(1408, 5632, 1024))
        >>> with_coverage(model, select(model), decided).coverage.share
        1.0
    """
    found = coverage(model, selection, decided.layers)
    if found.warning():
        logger.warning("%s", found.warning())
    return replace(decided, coverage=found)
