"""What a layer takes on this machine: through its factors, or rebuilt and multiplied."""

from __future__ import annotations

import math

from tnlm.layers.machine import Machine
from tnlm.tensors.contraction import Chain, pairwise, passes_in, passes_out
from tnlm.tensors.network import Network

MOST_TOKENS = 2**15
"""Token counts are weighed up to this one."""
GAIN = 0.9
"""A rebuilt weight must be predicted to take at most this share of the factors' time."""


def crossing(
    network: Network, plan: Chain, machine: Machine, itemsize: int, *, kept: bool = False
) -> float:
    """Return the token count from which the dense matrix is faster than the factors.

    Multiply-adds alone do not tell: narrow factors multiply slowly, activations are put into
    another order between steps, and at few tokens reading the weight is all that counts.

    Args:
        network: of the weight.
        plan: its steps.
        machine: the prices.
        itemsize: bytes of one number.
        kept: whether the dense matrix is at hand and need not be rebuilt.

    Returns:
        A power of two, or infinity if the factors are faster at any count.

    Example:
        >>> from tnlm.tensors.contraction import chain
        >>> machine = Machine(1e-6, 1e-10, 1e-10, (1e-9, 1e-10, 2e-11, 1e-11), True)
        >>> low_rank = Network({"l": "oa", "r": "ai"}, "o", "i", {"o": 512, "a": 64, "i": 512})
        >>> crossing(low_rank, chain(low_rank), machine, 4)
        inf
    """
    rows, columns = network.shape
    first = 0.0 if kept else rebuilding(network, machine, itemsize)
    tokens = 1
    while tokens <= MOST_TOKENS:
        dense = first + machine.product(tokens, rows, columns, 1, itemsize)
        if dense < GAIN * through(network, plan, machine, itemsize, tokens):
            return tokens
        tokens *= 2
    return math.inf


def through(network: Network, plan: Chain, machine: Machine, itemsize: int, tokens: int) -> float:
    """Return the seconds that tokens take through the factors, step by step."""
    seconds, numbers = 0.0, network.shape[1]
    for step in plan.steps:
        if step.permute is not None:
            seconds += machine.reorder(tokens * numbers, itemsize)
        rows, width = network.size(step.kept), step.width
        met = tokens * math.prod(step.rest)
        # The identity block is not multiplied; its numbers are put in order with the others.
        if passes_out(network, step.factor, step.batch, step.contracted):
            seconds += machine.reorder(met * rows, itemsize)
            rows -= width
        elif passes_in(network, step.factor, step.batch, step.kept):
            seconds += machine.reorder(met * width, itemsize)
            width -= rows
        seconds += machine.product(met, rows, width, step.blocks, itemsize)
        numbers = math.prod(step.after)
    if plan.permute is not None:
        seconds += machine.reorder(tokens * numbers, itemsize)
    return seconds


def rebuilding(network: Network, machine: Machine, itemsize: int) -> float:
    """Return the seconds that contracting the factors with each other takes."""
    seconds = 0.0
    for _, equation in pairwise(network).steps:
        terms, result = equation.split("->")
        first, _, second = terms.partition(",")
        shared = set(first) & set(second)
        count = network.size("".join(shared & set(result)))
        width = network.size("".join(shared - set(result)))
        rows, others = (network.size("".join(set(t) - shared)) for t in (first, second))
        seconds += machine.product(rows, others, width, count, itemsize)
        seconds += machine.reorder(network.size(result), itemsize)
    return seconds
