"""Tries whether hidden channels, or heads, act one by one: what cutting some out supposes.

What stands between the matrices is not read but run, on random values: an activation may well mix
channels without a parameter of its own, as Gemma 3n's does, which takes their mean and deviation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.targets.stubs import Around, Call, Stub, calls, copied, detours, widths

TOKENS = 16
"""Tokens of random values."""

LOUD = 8.0
"""Groups that are cut have values this many times as large, and as far from 0: if anything is taken
over all groups, such as a mean or a maximum, it is another without them. At every second token they
are this often squared as small: so is a minimum of their sizes."""

CLOSE = 16
"""Values are the same that differ by this many units in the last place of the largest."""


@dataclass(frozen=True)
class Slabs:
    """Where the values of one group are in the outputs of a matrix.

    Attributes:
        size: adjacent outputs of one group; those of interleaved gates and values are 2.
        parts: how many equal parts stand one after another, each with as many of every group;
            concatenated gates and values are 2.
    """

    size: int = 1
    parts: int = 1

    @property
    def each(self) -> int:
        """Outputs of one group, in all parts."""
        return self.size * self.parts

    def rows(self, groups: Tensor, count: int) -> Tensor:
        """Return the outputs of some of ``count`` groups, in the order of the matrix.

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
        producers: where a group is in the outputs of the matrices, by their names in the layer.
        reader: name of the matrix that reads the hidden values.
        size: adjacent inputs of the reader that belong to one group.
        count: how many groups there are.
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
    """Return why groups cannot be cut out of a layer, or None if the others are the same without.

    The layer runs twice, on copies of its modules that share its parameters and have no hooks. In
    place of the matrices are modules that give random values, in the second run those of ``keep``
    groups alone. With these the reader must be given the same values as before, and the layer's
    output must be the same. No matrix is multiplied; weights, hooks, training flags and the random
    state stay as they are.

    Args:
        layer: the module that holds the matrices.
        hidden: what is cut: values of some groups.
        keep: how many groups stay in the second run, half of them by default.
        call: what the layer is called with; by default random hidden states, and nothing or the
            same for other arguments without a default. Modules beside the matrices, such as
            attention, that cannot be called so are passed by.
        sizes: a layer of the same kind with ``keep`` groups; whole numbers that modules remember,
            such as numbers of heads, are taken from it for the second run.

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
        'what down reads of one group depends on the others'
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
            except Exception as error:  # another's code, that may raise anything
                why = f"it cannot be tried by itself ({type(error).__name__}: {error})"
                continue
            if full.unused:
                return "one of its matrices is used in another way than by calling it"
            try:
                part = _Run(layer, hidden, around, sizes)
                part.give(hidden, kept, cut=True)
                return _difference(hidden, kept, full, whole, part, part(args, kwargs))
            except Exception as error:
                return f"it does not run with fewer groups ({type(error).__name__}: {error})"
    return why


def _choose(count: int, keep: int | None) -> Tensor:
    """Return which groups stay, in their order."""
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
    """A copy of a layer with stubs for its matrices, and what its reader was given."""

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
        """Give values of which the groups that are not kept are loud or faint, or cut out."""
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
        """What the reader was given, at every call."""
        return self._reader.given

    @property
    def passed(self) -> list[Tensor]:
        """What the modules beside the matrices were given, at every call."""
        return [given for bypass in self._around.values() for given in bypass.given]

    @property
    def unused(self) -> bool:
        """Whether a matrix was never called, as where its weight is used in another way."""
        return not all(stub.given for stub in (*self._makers.values(), self._reader))


def _cutter(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what leaves some values alone."""
    return lambda values: values[:, rows.to(values.device)]


def _shouter(loud: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what makes some values loud at every second token, and faint at the others."""

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
    """Return what differs between the runs."""
    columns = Slabs(hidden.size).rows(kept, hidden.count)
    for before, after in zip(full.read, part.read, strict=True):
        if not _same(before[..., columns.to(before.device)], after):
            return f"what {hidden.reader} reads of one group depends on the others"
    beside = zip(full.passed, part.passed, strict=True)
    if not all(_same(before, after) for before, after in beside) or not _same(whole, output):
        return f"its output depends on the groups otherwise than through {hidden.reader}"
    return None


def _same(before: Tensor, after: Tensor) -> bool:
    """Tell whether two computations of some values agree, up to rounding."""
    if before.shape != after.shape or not bool(before.isfinite().all()):
        return False
    close = CLOSE * torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool((before.double() - after.double()).abs().max() <= close)
