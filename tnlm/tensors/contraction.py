"""Plans contractions when a layer is built, so that forward only runs a fixed list of steps.

A network has two plans. The *chain* carries an activation through the factors one by one, with one
matrix product per factor; layers run this plan. The *pairwise* plan contracts the factors with each
other, to rebuild the matrix or look up rows of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import opt_einsum
import torch
from torch import Tensor

from tnlm.errors import RankError
from tnlm.tensors.network import Gauge, Network


@dataclass(frozen=True)
class Step:
    """One product of the activation with one factor, viewed as matrices (kept, contracted).

    Args:
        factor: the factor's name.
        batch: shared modes that are needed later; each of their indices has its own matrix.
        kept: modes of the factor that the step adds to the activation.
        contracted: modes that the step sums over.
        permute: how to reorder the activation's modes first, or None.
        blocks: the number of matrices: the total size of the batch modes.
        width: the total size of the contracted modes.
        rest: sizes of the activation's modes that the step leaves alone.
        after: sizes of all the activation's modes after the step.
    """

    factor: str
    batch: str
    kept: str
    contracted: str
    permute: tuple[int, ...] | None
    blocks: int
    width: int
    rest: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def rows(self) -> str:
        """The modes that index the rows of the factor, stored as a matrix (rows, contracted)."""
        return self.batch + self.kept

    @property
    def is_flat(self) -> bool:
        """Whether the step is one matrix product with the whole activation as stored."""
        return self.permute is None and self.blocks == 1 and math.prod(self.rest) == 1


@dataclass(frozen=True)
class Chain:
    """Steps that carry an activation from ``in`` to ``out``, and their multiply-adds per token."""

    steps: tuple[Step, ...]
    permute: tuple[int, ...] | None
    macs: int

    @property
    def order(self) -> tuple[str, ...]:
        """The factors, in the order in which they are applied."""
        return tuple(step.factor for step in self.steps)

    @cached_property
    def is_flat(self) -> bool:
        """Whether every step takes the whole activation as stored, so that none is reshaped."""
        return all(step.is_flat for step in self.steps) and self.permute is None


def chain(network: Network, order: Sequence[str] | None = None) -> Chain:
    """Plan how an activation passes through the factors.

    Args:
        network: the network to run.
        order: the order of the factors; by default, the one with the fewest multiply-adds.

    Raises:
        RankError: if ``order`` does not name every factor once.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> plan = chain(net)
        >>> plan.order, plan.macs
        (('right', 'left'), 22)
    """
    modes, sizes = tuple(network.factors.items()), tuple(network.sizes.items())
    wanted = None if order is None else tuple(order)
    return _planned(modes, network.out, network.inp, sizes, network.gauge, wanted)


@lru_cache(maxsize=4096)  # layers of one shape have the same candidates
def _planned(
    modes: Sequence[tuple[str, str]],
    out: str,
    inp: str,
    sizes: Sequence[tuple[str, int]],
    gauge: Gauge | None,
    order: Sequence[str] | None,
) -> Chain:
    network = Network(dict(modes), out, inp, dict(sizes), gauge)
    if order is None:
        order = min(_orders(network), key=lambda item: item[0])[1]
    if sorted(order) != sorted(network.factors):
        raise RankError(f"order={tuple(order)}; allowed: a permutation of {list(network.factors)}")
    current, macs, steps = network.inp, 0, []
    for position, factor in enumerate(order):
        rest, batch, kept, contracted = roles = _roles(network, current, factor, order[:position])
        macs += _price(network, factor, roles)
        steps.append(
            Step(
                factor,
                batch,
                kept,
                contracted,
                _permutation(network, current, rest + batch + contracted),
                network.size(batch),
                network.size(contracted),
                tuple(network.sizes[mode] for mode in rest),
                tuple(network.sizes[mode] for mode in roles.after),
            )
        )
        current = roles.after
    return Chain(tuple(steps), _permutation(network, current, network.out), macs)


def _orders(network: Network) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (multiply-adds, order) for every order of the factors."""

    def visit(
        current: str, done: tuple[str, ...], macs: int
    ) -> Iterator[tuple[int, tuple[str, ...]]]:
        if len(done) == len(network.factors):
            yield macs, done
        for factor, modes in network.factors.items():
            if factor in done or not set(modes) & set(current):
                continue
            roles = _roles(network, current, factor, done)
            price = _price(network, factor, roles)
            yield from visit(roles.after, (*done, factor), macs + price)

    yield from visit(network.inp, (), 0)


class _Roles(NamedTuple):
    """The roles of the modes of an activation and a factor in a step; see `Step`."""

    rest: str
    batch: str
    kept: str
    contracted: str

    @property
    def after(self) -> str:
        """The modes of the activation after the step."""
        return self.rest + self.batch + self.kept


def _roles(network: Network, current: str, factor: str, done: Sequence[str]) -> _Roles:
    """Sort the modes; shared ones that the outputs or a later factor hold are batch modes."""
    modes = network.factors[factor]
    later = [other for name, other in network.factors.items() if name not in (factor, *done)]
    needed = network.out + "".join(later)
    return _Roles(
        rest="".join(mode for mode in current if mode not in modes),
        batch="".join(mode for mode in current if mode in modes and mode in needed),
        kept="".join(mode for mode in modes if mode not in current),
        contracted="".join(mode for mode in current if mode in modes and mode not in needed),
    )


def _price(network: Network, factor: str, roles: _Roles) -> int:
    """Return the multiply-adds of a step; the identity block of a gauge is free."""
    rows, width, gauge = network.size(roles.kept), network.size(roles.contracted), network.gauge
    if gauge is not None and passes_out(network, factor, roles.batch, roles.contracted):
        rows -= network.sizes[gauge.bond]
    elif gauge is not None and passes_in(network, factor, roles.batch, roles.kept):
        width -= network.sizes[gauge.bond]
    return network.size(roles.rest + roles.batch) * width * rows


def passes_out(network: Network, factor: str, batch: str, contracted: str) -> bool:
    """Return whether a step can copy its contracted inputs to the rows of its identity block."""
    gauge = network.gauge
    return (
        gauge is not None
        and gauge.factor == factor
        and contracted == gauge.bond
        and network.size(batch) == 1
    )


def passes_in(network: Network, factor: str, batch: str, kept: str) -> bool:
    """Return whether a step can add the inputs at its identity block directly to its result."""
    gauge = network.gauge
    return (
        gauge is not None
        and gauge.factor == factor
        and kept == gauge.bond
        and network.size(batch) == 1
    )


def stored_shapes(network: Network, steps: Sequence[Step]) -> dict[str, tuple[int, int]]:
    """Return the shape in which every factor is stored, laid out for its step of a chain.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> stored_shapes(net, chain(net).steps)
        {'right': (2, 5), 'left': (6, 2)}
    """
    shapes = {}
    for step in steps:
        shapes[step.factor] = (network.size(step.rows), network.size(step.contracted))
        if network.gauge is not None and network.gauge.factor == step.factor:
            bond = network.sizes[network.gauge.bond]
            free = network.gauge_rows - bond
            across = passes_in(network, step.factor, step.batch, step.kept)
            shapes[step.factor] = (bond, free) if across else (free, bond)
    return shapes


def _permutation(network: Network, current: str, wanted: str) -> tuple[int, ...] | None:
    """Return how modes are reordered; None if only modes of size 1 move (a reshape suffices)."""

    def lying(modes: str) -> list[str]:
        return [mode for mode in modes if network.sizes[mode] > 1]

    if lying(current) == lying(wanted):
        return None
    return tuple(current.index(mode) for mode in wanted)


@dataclass(frozen=True)
class Pairwise:
    """A fixed list of two-operand einsums: the operand positions and equation of each."""

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
    """Plan how to contract the factors with each other into one tensor of all open modes.

    Example:
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> pairwise(net).steps, pairwise(net).macs
        ((((1, 0), 'ai,oa->oi'),), 60)
    """
    terms = list(network.factors.values())
    shapes = [network.shape_of(factor) for factor in network.factors]
    # "optimal" tries every order, which takes minutes for nine factors; "dp" takes milliseconds.
    search = "optimal" if len(terms) <= 6 else "dp"
    path, _ = opt_einsum.contract_path(network.equation, *shapes, shapes=True, optimize=search)
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
