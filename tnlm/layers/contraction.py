"""Plans pairwise contractions when a layer is built, so that forward only runs a fixed list.

Two plans exist for a network. The *chain* carries an activation through the factors one by one,
each step a matrix product with one factor: that is what a layer runs. The *pairwise* plan
contracts the factors with each other: that rebuilds the matrix, or looks up rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import opt_einsum
import torch
from torch import Tensor

from tnlm.errors import RankError
from tnlm.network import Network


@dataclass(frozen=True)
class Step:
    """One product of the activation with one factor, seen as a matrix (kept, contracted).

    Args:
        factor: the factor's name.
        kept: modes of the factor that the step adds to the activation.
        contracted: modes that the step sums over.
        permute: how the activation's modes are reordered first, or None.
        width: the size of the contracted modes together.
        rest: sizes of the activation's modes that the step leaves alone.
        after: sizes of all its modes after the step.
    """

    factor: str
    kept: str
    contracted: str
    permute: tuple[int, ...] | None
    width: int
    rest: tuple[int, ...]
    after: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """Steps that carry an activation from ``in`` to ``out``, and their multiply-adds per token."""

    steps: tuple[Step, ...]
    permute: tuple[int, ...] | None
    macs: int

    @property
    def order(self) -> tuple[str, ...]:
        """The factors, in the order in which they meet the activation."""
        return tuple(step.factor for step in self.steps)

    @cached_property
    def is_flat(self) -> bool:
        """Whether every step contracts the whole activation as it lies, so no reshape is needed."""
        plain = all(step.permute is None and not step.rest for step in self.steps)
        return plain and self.permute is None


def chain(network: Network, order: Sequence[str] | None = None) -> Chain:
    """Plan how an activation passes through the factors.

    Args:
        network: a network in which every mode stands in two places.
        order: the factors in the order wanted; the order of least multiply-adds if not given.

    Raises:
        RankError: if ``order`` does not name every factor once.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> plan = chain(net)
        >>> plan.order, plan.macs
        (('right', 'left'), 22)
    """
    if order is None:
        order = min(_orders(network), key=lambda item: item[0])[1]
    if sorted(order) != sorted(network.factors):
        raise RankError(f"order={tuple(order)}; allowed: a permutation of {list(network.factors)}")
    current, macs, steps = network.inp, 0, []
    for factor in order:
        kept, contracted = _split(network.factors[factor], current)
        rest = "".join(mode for mode in current if mode not in contracted)
        macs += network.size(rest + contracted) * _applied_rows(network, factor, kept, contracted)
        steps.append(
            Step(
                factor,
                kept,
                contracted,
                _permutation(current, rest + contracted),
                network.size(contracted),
                tuple(network.sizes[mode] for mode in rest),
                tuple(network.sizes[mode] for mode in rest + kept),
            )
        )
        current = rest + kept
    return Chain(tuple(steps), _permutation(current, network.out), macs)


def _orders(network: Network) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (multiply-adds, order) of every way to pass an activation through the factors."""

    def visit(
        current: str, done: tuple[str, ...], macs: int
    ) -> Iterator[tuple[int, tuple[str, ...]]]:
        if len(done) == len(network.factors):
            yield macs, done
        for factor, modes in network.factors.items():
            kept, contracted = _split(modes, current)
            if factor in done or not contracted:
                continue
            rest = "".join(mode for mode in current if mode not in contracted)
            rows = _applied_rows(network, factor, kept, contracted)
            cost = network.size(rest + contracted) * rows
            yield from visit(rest + kept, (*done, factor), macs + cost)

    yield from visit(network.inp, (), 0)


def _split(modes: str, current: str) -> tuple[str, str]:
    kept = "".join(mode for mode in modes if mode not in current)
    return kept, "".join(mode for mode in current if mode in modes)


def _applied_rows(network: Network, factor: str, kept: str, contracted: str) -> int:
    """Rows that the step multiplies by: the identity block of a gauge passes through for free."""
    gauge = network.gauge
    saved = (
        network.sizes[gauge.bond] if gauge and passes_through(network, factor, contracted) else 0
    )
    return network.size(kept) - saved


def passes_through(network: Network, factor: str, contracted: str) -> bool:
    """Tell whether a step can copy the rows of its identity block instead of multiplying."""
    gauge = network.gauge
    return gauge is not None and gauge.factor == factor and contracted == gauge.bond


def _permutation(current: str, wanted: str) -> tuple[int, ...] | None:
    return None if current == wanted else tuple(current.index(mode) for mode in wanted)


@dataclass(frozen=True)
class Pairwise:
    """A fixed list of two-operand einsums: operand positions and the equation of each."""

    steps: tuple[tuple[tuple[int, ...], str], ...]
    macs: int

    def __call__(self, operands: Sequence[Tensor]) -> Tensor:
        """Contract the operands; each step's result is appended to the list."""
        tensors = list(operands)
        for positions, equation in self.steps:
            taken = [tensors.pop(position) for position in positions]
            tensors.append(torch.einsum(equation, *taken))
        return tensors[0]


def pairwise(network: Network) -> Pairwise:
    """Plan how the factors are contracted with each other into a table of all open modes.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> pairwise(net).steps, pairwise(net).macs
        ((((1, 0), 'ai,oa->oi'),), 60)
    """
    terms = list(network.factors.values())
    shapes = [network.shape_of(factor) for factor in network.factors]
    path, _ = opt_einsum.contract_path(network.equation, *shapes, shapes=True, optimize="optimal")
    steps, macs = [], 0
    for index, chosen in enumerate(path):
        positions = tuple(sorted(chosen, reverse=True))
        taken = [terms.pop(position) for position in positions]
        needed = set("".join(terms)) | set(network.out + network.inp)
        result = "".join(dict.fromkeys("".join(taken)))
        macs += network.size(result) if len(taken) > 1 else 0
        result = "".join(mode for mode in result if mode in needed)
        if index == len(path) - 1:
            result = network.out + network.inp
        steps.append((positions, ",".join(taken) + "->" + result))
        terms.append(result)
    return Pairwise(tuple(steps), macs)
