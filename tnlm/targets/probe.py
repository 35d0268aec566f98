"""Finds the matrices that produce another's input channels, by changing their outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.targets.stubs import Around, Call, Linear, Stub, calls, copied, detours, widths
from tnlm.targets.trial import Hidden, Slabs, objection

TOKENS = 32
"""Number of tokens with random values. With fewer, a rectified gate could be negative at all of
them and hide the values that it multiplies."""
SPREAD = (1.0, 2.0, 0.5, 4.0)
"""Scales of the values at successive tokens."""


@dataclass(frozen=True)
class Finding:
    """The channels that a matrix reads.

    Attributes:
        hidden: the channels and their producers; None if the matrix reads no channels.
        gates: for every producer with two outputs per channel, whether the first of the two is the
            gate, which has an activation.
        reason: why the channels cannot be removed, or None.
    """

    hidden: Hidden | None = None
    gates: tuple[tuple[str, bool], ...] = ()
    reason: str | None = None


@torch.no_grad()
def probe(layer: nn.Module, reader: str, names: Sequence[str]) -> Finding:
    """Find which matrices of a layer produce the inputs of another, channel by channel.

    A producer has one or two outputs per input of the reader. For every bit of the index and both
    its values, the outputs whose index has this bit are changed. If exactly the reader's inputs
    with the same bit change, then each input depends on a single output. With two outputs per
    channel, this must hold for both halves, or for the even and the odd outputs. Tokens must not
    mix, as they do in attention. Finally, the channels are removed for a trial; see
    `tnlm.targets.trial.objection`.

    Args:
        layer: run on copies with stubs in place of all its matrices; left unchanged.
        reader: name of a matrix in it.
        names: names of other matrices in it with one or two outputs per input of the reader.

    Example:
        >>> class Gated(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 16), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         gate, value = self.up(x).chunk(2, -1)
        ...         return self.down(gate.relu() * value)
        >>> found = probe(Gated(), "down", ["up"])
        >>> found.hidden.producers, found.gates
        ({'up': Slabs(size=1, parts=2)}, (('up', True),))
    """
    module: Any = layer.get_submodule(reader)
    count = widths(module)[1]
    if count < 2:
        return Finding()
    devices = [module.weight.device] if module.weight.is_cuda else []
    with torch.random.fork_rng(devices):
        trial = _run(layer, reader, names)
        try:
            return Finding() if trial is None else _judge(layer, trial, reader, names, count)
        except Exception:  # the model's code may raise anything
            return Finding()


def _run(layer: nn.Module, reader: str, names: Sequence[str]) -> _Trial | None:
    """Return a runnable copy of the layer in which the reader is called, or None."""
    matrices = [layer.get_submodule(name) for name in (*names, reader)]
    for width in dict.fromkeys(widths(module)[1] for module in matrices[:-1]):
        for around, call in _ways(layer, matrices, width):
            trial = _Trial(layer, reader, names, around(), call)
            try:
                trial.read()
            except Exception:  # the model's code may raise anything
                continue
            return trial
    return None


def _ways(
    layer: nn.Module, matrices: Sequence[nn.Module], width: int
) -> Iterator[tuple[Around, Call]]:
    like: Any = matrices[-1].weight
    for around in detours(layer, matrices):
        for call in calls(layer, TOKENS, width, like):
            yield around, call


def _judge(
    layer: nn.Module, trial: _Trial, reader: str, names: Sequence[str], count: int
) -> Finding:
    """Return the channels found in a runnable layer."""
    everything = {n: torch.arange(widths(layer.get_submodule(n))[0]) for n in names}
    if not bool(trial.changed(everything).any()) or trial.mixes_tokens():
        return Finding()
    reach = {n: rows for n, rows in everything.items() if bool(trial.changed({n: rows}).any())}
    found = {n: _slabs(trial, n, len(rows), count) for n, rows in reach.items()}
    producers = {n: slabs or Slabs(parts=len(reach[n]) // count) for n, slabs in found.items()}
    hidden = Hidden(producers, reader, size=1, count=count)
    if None in found.values():
        back = widths(layer.get_submodule(reader))[0]
        returns = all(widths(layer.get_submodule(name))[1] == back for name in found)
        reason = "the code between the matrices mixes the channels"
        return Finding(hidden, reason=reason) if returns else Finding()
    if len(reach) == 1 and all(trial.multiplies(name, rows) for name, rows in reach.items()):
        return Finding()  # no activation: a product of two matrices
    gates = [
        (name, trial.multiplies(name, second) or not trial.multiplies(name, first))
        for name, slabs in producers.items()
        if slabs.each == 2
        for first, second in [_halves(slabs, count)]
    ]
    return Finding(hidden, tuple(gates), objection(layer, hidden))


def _slabs(trial: _Trial, name: str, rows: int, count: int) -> Slabs | None:
    """Return the positions of the channels in a matrix's outputs, if each has its own."""
    layouts = [Slabs()] if rows == count else [Slabs(parts=2), Slabs(size=2)]
    for slabs in layouts:
        if all(trial.is_by_channel(name, part) for part in _halves(slabs, count)):
            return slabs
    return None


def _halves(slabs: Slabs, count: int) -> list[Tensor]:
    """Return the outputs of all channels, one index for each output per channel."""
    every = slabs.rows(torch.arange(count), count)
    if slabs.parts > 1:
        return list(every.reshape(slabs.parts, count))
    return list(every.reshape(count, slabs.size).T)


class _Trial:
    """A copy of a layer whose matrices are stubs, and the inputs of its reader."""

    def __init__(
        self,
        layer: nn.Module,
        reader: str,
        names: Sequence[str],
        around: dict[nn.Module, Any],
        call: Call,
    ) -> None:
        stubs: dict[nn.Module, Stub] = {}
        for seed, module in enumerate(layer.modules(), start=2):
            if isinstance(module, Linear) and module.weight.is_floating_point():
                stubs[module] = Stub(module, seed)
        self._stubs = {name: stubs[layer.get_submodule(name)] for name in names}
        self._reader = stubs[layer.get_submodule(reader)]
        self._every = [stub for stub in stubs.values() if stub is not self._reader]
        others: dict[nn.Module, nn.Module] = {**stubs, **around}
        self._copy, self._call = copied(layer, others), call
        for stub in stubs.values():
            stub.change = _sized
        self._before: Tensor | None = None

    def read(self) -> Tensor:
        """Return the reader's input, ``(tokens, channels)``."""
        if self._before is None:
            self._before = self._seen()
        return self._before

    def changed(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return which of the reader's inputs change with some outputs of matrices."""
        stubs = {self._stubs[name]: chosen for name, chosen in rows.items()}
        return self._with(stubs, -1.5) != self.read()

    def mixes_tokens(self) -> bool:
        """Return whether a change at every second token affects other tokens."""
        everything = {stub: torch.arange(stub.columns) for stub in self._every}
        return bool((self._with(everything, -1.5, slice(0, None, 2)) != self.read())[1::2].any())

    def is_by_channel(self, name: str, rows: Tensor) -> bool:
        """Return whether every channel depends on exactly its own one of some outputs."""
        numbers = torch.arange(len(rows))
        for bit in range((len(rows) - 1).bit_length()):
            for value in (0, 1):
                chosen = (numbers >> bit) & 1 == value
                seen = self.changed({name: rows[chosen]}).any(0)
                if not torch.equal(seen.cpu(), chosen):
                    return False
        return True

    def multiplies(self, name: str, rows: Tensor) -> bool:
        """Return whether the reader's input is proportional to some outputs of a matrix."""
        return torch.equal(self._with({self._stubs[name]: rows}, -2.0), -2.0 * self.read())

    def _with(
        self, rows: Mapping[Stub, Tensor], factor: float, tokens: slice = slice(None)
    ) -> Tensor:
        """Return the reader's input if some outputs are scaled."""
        for stub, chosen in rows.items():
            stub.change = partial(_scaled, chosen, factor, tokens)
        found = self._seen()
        for stub in rows:
            stub.change = _sized
        return found

    def _seen(self) -> Tensor:
        self._reader.given.clear()
        args, kwargs = self._call
        self._copy(*args, **kwargs)
        return torch.cat([given.flatten(0, -2) for given in self._reader.given])


def _sized(values: Tensor) -> Tensor:
    """Scale the values differently at successive tokens."""
    sizes = torch.tensor(SPREAD).repeat(-(-len(values) // len(SPREAD)))[: len(values)]
    return values * sizes.to(values).unsqueeze(1)


def _scaled(rows: Tensor, factor: float, tokens: slice, values: Tensor) -> Tensor:
    """Scale some outputs at some tokens."""
    factors = torch.ones_like(values)
    factors[tokens, rows.to(values.device)] = factor
    return _sized(values) * factors
