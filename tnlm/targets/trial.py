"""Tests whether hidden channels, or heads, act independently, so that some can be removed.

The code between the matrices is run on random values, not analysed, since an activation may mix
channels without parameters. Gemma 3n's does: it takes their mean and deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.targets.stubs import Around, Call, Stub, calls, copied, detours, widths

TOKENS = 16
"""Number of tokens with random values."""

LOUD = 8.0
"""Scale and offset of the values of removed groups, so that any statistic of all groups, such as a
mean or a maximum, changes without them. At every second token, these values are divided by its
square instead, which changes a minimum of magnitudes."""

CLOSE = 16
"""Values may differ by this many units in the last place of the largest."""


@dataclass(frozen=True)
class Slabs:
    """The positions of a group's values in the outputs of a matrix.

    Attributes:
        size: number of adjacent outputs per group; 2 for interleaved gates and values.
        parts: number of equal, concatenated parts, each with outputs of every group; 2 for
            concatenated gates and values.
    """

    size: int = 1
    parts: int = 1

    @property
    def each(self) -> int:
        """Number of outputs per group, in all parts."""
        return self.size * self.parts

    def rows(self, groups: Tensor, count: int) -> Tensor:
        """Return the outputs of some of ``count`` groups, in the matrix's order.

        Example:
            >>> Slabs(size=3).rows(torch.tensor([0, 2]), 4).tolist()
            [0, 1, 2, 6, 7, 8]
            >>> Slabs(parts=2).rows(torch.tensor([0, 2]), 4).tolist()
            [0, 2, 4, 6]
        """
        inside = (groups.unsqueeze(1) * self.size + torch.arange(self.size).to(groups)).flatten()
        starts = torch.arange(self.parts).to(groups) * self.size * count
        return (starts.unsqueeze(1) + inside).flatten()


@dataclass(frozen=True)
class Hidden:
    """The hidden values between some matrices and the one that reads them, in equal groups.

    Attributes:
        producers: positions of a group in the outputs of each matrix, by its name in the layer.
        reader: name of the matrix that reads the hidden values.
        size: number of adjacent inputs of the reader per group.
        count: number of groups.
    """

    producers: Mapping[str, Slabs]
    reader: str
    size: int
    count: int


@torch.no_grad()
def objection(
    layer: nn.Module,
    hidden: Hidden,
    *,
    keep: int | None = None,
    call: Call | None = None,
    sizes: nn.Module | None = None,
) -> str | None:
    """Return why groups cannot be removed from a layer, or None if the others do not change.

    The layer is run twice, on copies of its modules that share its parameters and have no hooks.
    The matrices are replaced by stubs that return random values, in the second run only those of
    ``keep`` groups. For these, the reader's input must be the same as before, and so must the
    layer's output. No matrix is multiplied; weights, hooks, training flags and the random state do
    not change.

    Args:
        layer: the module that holds the matrices.
        hidden: the hidden values from which groups are removed.
        keep: number of groups in the second run; by default, half.
        call: arguments of the layer; by default, random hidden states, and None or the same for
            other required arguments. Modules beside the matrices, such as attention, are skipped if
            they cannot be called with these.
        sizes: a layer of the same structure with ``keep`` groups, from which integer attributes,
            such as the number of heads, are copied for the second run.

    Example:
        >>> class Layer(nn.Module):
        ...     def __init__(self, between):
        ...         super().__init__()
        ...         self.up, self.down, self.between = nn.Linear(4, 8), nn.Linear(8, 4), between
        ...     def forward(self, x):
        ...         return self.down(self.between(self.up(x)))
        >>> channels = Hidden({"up": Slabs()}, "down", size=1, count=8)
        >>> objection(Layer(nn.GELU()), channels) is None
        True
        >>> objection(Layer(nn.Softmax(-1)), channels)
        'the values of one group that down reads depend on other groups'
    """
    kept = _choose(hidden.count, keep)
    reader: Any = layer.get_submodule(hidden.reader)
    why = "it cannot be called"
    devices = [reader.weight.device] if reader.weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for (args, kwargs), around in _ways(layer, hidden, call):
            try:
                full = _Run(layer, hidden, around)
                full.give(hidden, kept, cut=False)
                whole = full(args, kwargs)
            except Exception as error:  # the model's code may raise anything
                why = f"it cannot be tried by itself ({type(error).__name__}: {error})"
                continue
            if full.unused:
                return "it uses one of its matrices without calling it"
            try:
                part = _Run(layer, hidden, around, sizes)
                part.give(hidden, kept, cut=True)
                return _difference(hidden, kept, full, whole, part, part(args, kwargs))
            except Exception as error:
                return f"it does not run with fewer groups ({type(error).__name__}: {error})"
    return why


def _choose(count: int, keep: int | None) -> Tensor:
    """Return the groups to keep, in order."""
    number = max(1, count // 2) if keep is None else keep
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:number]
    return chosen.sort().values


def _ways(layer: nn.Module, hidden: Hidden, call: Call | None) -> Iterator[tuple[Call, Around]]:
    """Yield ways to run a layer."""
    if call is not None:
        yield call, dict
        return
    matrices = [layer.get_submodule(name) for name in (*hidden.producers, hidden.reader)]
    width = widths(matrices[0])[1]
    like: Any = matrices[-1].weight
    for around in detours(layer, matrices):
        for each in calls(layer, TOKENS, width, like):
            yield each, around


class _Run:
    """A copy of a layer with stubs for its matrices, and the inputs of its reader."""

    def __init__(
        self, layer: nn.Module, hidden: Hidden, around: Around, sizes: nn.Module | None = None
    ) -> None:
        self._around = around()
        self._makers = {
            name: Stub(layer.get_submodule(name), seed)
            for seed, name in enumerate(hidden.producers, start=2)
        }
        self._reader = Stub(layer.get_submodule(hidden.reader), 0)
        stubs = self._makers | {hidden.reader: self._reader}
        others = {layer.get_submodule(name): stub for name, stub in stubs.items()}
        self._layer = copied(layer, {**self._around, **others}, sizes)

    def give(self, hidden: Hidden, kept: Tensor, *, cut: bool) -> None:
        """Set whether the groups that are not kept have extreme values, or are removed."""
        for name, slabs in hidden.producers.items():
            rows = slabs.rows(kept, hidden.count)
            loud = torch.ones(hidden.count * slabs.each, dtype=torch.bool)
            loud[rows] = False
            self._makers[name].change = _cutter(rows) if cut else _shouter(loud)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the layer's output, the first if there are several."""
        output: Any = self._layer(*args, **kwargs)
        first: Tensor = output[0] if isinstance(output, tuple | list) else output
        return first

    @property
    def read(self) -> list[Tensor]:
        """The reader's inputs, of all calls."""
        return self._reader.given

    @property
    def passed(self) -> list[Tensor]:
        """The inputs of the modules beside the matrices, of all calls."""
        return [given for bypass in self._around.values() for given in bypass.given]

    @property
    def unused(self) -> bool:
        """Whether some matrix was never called, for instance if its weight is read directly."""
        return not all(stub.given for stub in (*self._makers.values(), self._reader))


def _cutter(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that returns only the values of some outputs."""
    return lambda values: values[:, rows.to(values.device)]


def _shouter(loud: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that makes some values large at every second token, else tiny."""

    def change(values: Tensor) -> Tensor:
        chosen = values[:, loud.to(values.device)]
        chosen[::2] = chosen[::2] * LOUD + LOUD
        chosen[1::2] /= LOUD**2
        values[:, loud.to(values.device)] = chosen
        return values

    return change


def _difference(
    hidden: Hidden, kept: Tensor, full: _Run, whole: Tensor, part: _Run, output: Tensor
) -> str | None:
    """Return what differs between the runs, or None."""
    columns = Slabs(hidden.size).rows(kept, hidden.count)
    for before, after in zip(full.read, part.read, strict=True):
        if not _same(before[..., columns.to(before.device)], after):
            return f"the values of one group that {hidden.reader} reads depend on other groups"
    beside = zip(full.passed, part.passed, strict=True)
    if not all(_same(before, after) for before, after in beside) or not _same(whole, output):
        return f"its output depends on the groups other than through {hidden.reader}"
    return None


def _same(before: Tensor, after: Tensor) -> bool:
    """Return whether two computations of some values agree, up to rounding."""
    if before.shape != after.shape or not bool(before.isfinite().all()):
        return False
    close = CLOSE * torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool((before.double() - after.double()).abs().max() <= close)
