"""Predicts a layer's time on this machine, through its factors or with a rebuilt weight."""

from __future__ import annotations

import math

from tnlm.layers.machine import Machine
from tnlm.tensors.contraction import Chain, chain, pairwise, passes_in, passes_out
from tnlm.tensors.costs import is_table
from tnlm.tensors.network import Network

MOST_TOKENS = 2**15
"""Largest token count to consider."""
VIEWS = 3
"""Small operations that a step on modes takes to give an activation its modes and back."""
GAIN = 0.9
"""A rebuilt weight is used if its predicted time is below this fraction of the factors'."""


def crossing(
    network: Network, plan: Chain, machine: Machine, itemsize: int, *, kept: bool = False
) -> float:
    """Return the token count from which the dense matrix is faster than the factors.

    Multiply-adds alone do not predict this: narrow factors multiply slowly, activations are
    reordered between steps, and with few tokens the time to read the weight dominates.

    Args:
        network: network of the weight.
        plan: its steps.
        machine: times of this machine.
        itemsize: bytes per element.
        kept: whether the dense matrix is cached and need not be rebuilt.

    Returns:
        A power of two, or infinity if the factors are faster at any count.

    Example:
        >>> from tnlm.tensors.contraction import chain
        >>> rates = (1e-9, 1e-10, 2e-11, 1e-11)
        >>> machine = Machine(1e-6, 1e-6, (1e-10,) * 5, 1e-10, rates, True)
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
    """Return the seconds that tokens take through the factors."""
    seconds, numbers = 0.0, network.shape[1]
    for step in plan.steps:
        if step.permute is not None:
            seconds += machine.reorder(tokens * numbers, itemsize)
        rows, width = network.size(step.kept), step.width
        met = tokens * math.prod(step.rest)
        # The identity block is not multiplied; its values are put in order with the others, and
        # joined to the results or added to them.
        if passes_out(network, step.factor, step.batch, step.contracted):
            seconds += machine.step + machine.reorder(met * rows, itemsize)
            rows -= width
        elif passes_in(network, step.factor, step.batch, step.kept):
            seconds += 2 * machine.step + machine.reorder(met * width, itemsize)
            width -= rows
        elif network.gauge is not None and network.gauge.factor == step.factor:
            # Joined with an identity block, put in order, and laid out for its step.
            seconds += 4 * machine.step + 3 * machine.reorder(step.blocks * rows * width, itemsize)
        if not plan.is_flat:
            seconds += VIEWS * machine.step
        seconds += machine.product(met, rows, width, step.blocks, itemsize, arranged=step.is_flat)
        numbers = math.prod(step.after)
    if plan.permute is not None:
        seconds += machine.reorder(tokens * numbers, itemsize)
    return seconds


def layer_time(
    product: tuple[int, int] | Network,
    machine: Machine,
    itemsize: int,
    tokens: int,
    *,
    arranged: bool = True,
) -> float:
    """Return the seconds that tokens take through a matrix, by its shape, or through a network.

    A matrix made by tnlm is arranged in memory; one that stays dense is not.

    Example:
        >>> rates = (1e-9, 1e-10, 2e-11, 1e-11)
        >>> machine = Machine(1e-6, 1e-6, (1e-10,) * 5, 1e-10, rates, True)
        >>> low_rank = Network({"l": "oa", "r": "ai"}, "o", "i", {"o": 512, "a": 64, "i": 512})
        >>> layer_time(low_rank, machine, 4, 1) < layer_time((512, 512), machine, 4, 1)
        True
    """
    if isinstance(product, tuple):
        return machine.product(tokens, *product, 1, itemsize, arranged=arranged)
    rebuilt = rebuilding(product, machine, itemsize)
    rebuilt += machine.product(tokens, *product.shape, 1, itemsize)
    if is_table(product):
        return rebuilt
    plan = chain(product)
    factors = through(product, plan, machine, itemsize, tokens)
    plain = plan.is_flat and plan.macs <= math.prod(product.shape)
    return rebuilt if not plain and rebuilt < GAIN * factors else factors


def rebuilding(network: Network, machine: Machine, itemsize: int) -> float:
    """Return the seconds to contract the factors with each other."""
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
