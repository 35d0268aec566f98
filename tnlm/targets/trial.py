"""Tries whether hidden channels, or heads, act one by one: what cutting some out supposes.

What stands between the matrices is not read but run, on random values: an activation may well mix
channels without a parameter of its own, as Gemma 3n's does, which takes their mean and deviation.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""

TOKENS = 16
"""Tokens of random values."""

LOUD = 8.0
"""Groups that are cut have values this many times as large, and as far from 0: if anything is taken
over all groups, such as a mean or a maximum, it is another without them. At every second token they
are this often squared as small: so is a minimum of their sizes."""

CLOSE = 16
"""Values are the same that differ by this many units in the last place of the largest."""


@dataclass(frozen=True)
class Hidden:
    """The hidden values between some matrices and the one that reads them, in equal groups.

    Attributes:
        producers: sizes of one group in the outputs of the matrices, by their names in the layer.
        reader: name of the matrix that reads the hidden values.
        size: adjacent inputs of the reader that belong to one group.
        count: how many groups there are.
    """

    producers: Mapping[str, int]
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
            same for other arguments without a default.
        sizes: a layer of the same kind with ``keep`` groups; whole numbers that modules remember,
            such as numbers of heads, are taken from it for the second run.

    Example:
        >>> class Layer(nn.Module):
        ...     def __init__(self, between):
        ...         super().__init__()
        ...         self.up, self.down, self.between = nn.Linear(4, 8), nn.Linear(8, 4), between
        ...     def forward(self, x):
        ...         return self.down(self.between(self.up(x)))
        >>> channels = Hidden({"up": 1}, "down", size=1, count=8)
        >>> objection(Layer(nn.GELU()), channels) is None
        True
        >>> objection(Layer(nn.Softmax(-1)), channels)
        'what down reads of one group depends on the others'
    """
    kept = _choose(hidden.count, keep)
    reader: Any = layer.get_submodule(hidden.reader)
    calls = _calls(layer, hidden, reader.weight) if call is None else [call]
    why = "it cannot be called"
    devices = [reader.weight.device] if reader.weight.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        for args, kwargs in calls:
            try:
                full = _Run(layer, hidden, kept, False, None)
                whole = full(args, kwargs)
            except Exception as error:  # another's code, that may raise anything
                why = f"it cannot be tried by itself ({type(error).__name__}: {error})"
                continue
            if full.unused:
                return "one of its matrices is used in another way than by calling it"
            try:
                part = _Run(layer, hidden, kept, True, sizes)
                return _difference(hidden, kept, full, whole, part, part(args, kwargs))
            except Exception as error:
                return f"it does not run with fewer groups ({type(error).__name__}: {error})"
    return why


def _choose(count: int, keep: int | None) -> Tensor:
    """Return which groups stay, in their order."""
    number = max(1, count // 2) if keep is None else keep
    chosen = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:number]
    return chosen.sort().values


def _calls(layer: nn.Module, hidden: Hidden, like: Tensor) -> Iterator[Call]:
    """Yield ways to call a layer with random hidden states."""
    first: Any = layer.get_submodule(next(iter(hidden.producers)))
    width = getattr(first, "in_features", None) or first.weight.shape[0]  # a Conv1D is (in, out)
    states = _random(TOKENS, width, 1, like).unsqueeze(0)
    wanted = [
        parameter.name
        for parameter in inspect.signature(layer.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    yield (states,), dict.fromkeys(wanted[1:])
    if wanted[1:]:  # such as a residual
        yield (states,), dict.fromkeys(wanted[1:], states)


def _random(rows: int, columns: int, seed: int, like: Tensor) -> Tensor:
    """Return the same random numbers for the same seed, ``(rows, columns)``."""
    made = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return made.to(like)


class _Stub(nn.Module):
    """Stands for a matrix: gives random values, and keeps what it was given."""

    def __init__(self, old: Any, columns: int, seed: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "in_features", "out_features", "nx", "nf"):
            if hasattr(old, name):
                object.__setattr__(self, name, getattr(old, name))
        self._columns, self._seed = columns, seed
        self._loud: Tensor | None = None
        self._cut: Tensor | None = None
        self.given: list[Tensor] = []

    def produce(self, loud: Tensor, cut: Tensor | None) -> None:
        """Give values: some loud or faint, and those that are not in ``cut`` left out."""
        self._loud, self._cut = loud, cut

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x)
        like: Any = self.weight
        values = _random(x.shape[:-1].numel(), self._columns, self._seed, like)
        if self._loud is not None:
            chosen = values[:, self._loud.to(values.device)]
            chosen[::2] = chosen[::2] * LOUD + LOUD
            chosen[1::2] /= LOUD**2
            values[:, self._loud.to(values.device)] = chosen
        if self._cut is not None:
            values = values[:, self._cut.to(values.device)]
        return values.reshape(*x.shape[:-1], -1)


class _Run:
    """A copy of a layer with stubs for its matrices, and what its reader was given."""

    def __init__(
        self,
        layer: nn.Module,
        hidden: Hidden,
        kept: Tensor,
        cut: bool,
        sizes: nn.Module | None,
    ) -> None:
        stubs: dict[nn.Module, _Stub] = {}
        for seed, (name, size) in enumerate(hidden.producers.items(), start=2):
            old = layer.get_submodule(name)
            stubs[old] = _Stub(old, hidden.count * size, seed)
            loud = torch.ones(hidden.count * size, dtype=torch.bool)
            loud[columns_of(kept, size)] = False
            stubs[old].produce(loud, columns_of(kept, size) if cut else None)
        reader: Any = layer.get_submodule(hidden.reader)
        rows = getattr(reader, "out_features", None) or reader.weight.shape[1]
        stubs[reader] = _Stub(reader, rows, 0)
        self._reader, self._stubs = stubs[reader], stubs
        self._layer = _copied(layer, stubs, sizes if cut else None)

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
    def unused(self) -> bool:
        """Whether a matrix was never called, as where its weight is used in another way."""
        return not all(stub.given for stub in self._stubs.values())


def columns_of(groups: Tensor, size: int) -> Tensor:
    """Return the columns of groups of adjacent columns.

    Example:
        >>> columns_of(torch.tensor([0, 2]), 3).tolist()
        [0, 1, 2, 6, 7, 8]
    """
    return (groups.unsqueeze(1) * size + torch.arange(size)).flatten()


def _copied(
    module: nn.Module, stubs: Mapping[nn.Module, _Stub], sizes: nn.Module | None
) -> nn.Module:
    """Copy modules, not their parameters, in eval mode and without hooks."""
    if module in stubs:
        return stubs[module]
    made = copy.copy(module)
    remembered = {} if sizes is None else vars(sizes)
    for name, value in vars(module).items():
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            object.__setattr__(made, name, OrderedDict())
        elif type(value) is int and type(remembered.get(name)) is int:
            object.__setattr__(made, name, remembered[name])
    made.__dict__["training"] = False
    made.__dict__["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in module._buffers.items()
    }
    made.__dict__["_modules"] = {
        name: None if child is None else _copied(child, stubs, _child(sizes, name))
        for name, child in module._modules.items()
    }
    return made


def _child(module: nn.Module | None, name: str) -> nn.Module | None:
    return None if module is None else module._modules.get(name)


def _difference(
    hidden: Hidden, kept: Tensor, full: _Run, whole: Tensor, part: _Run, output: Tensor
) -> str | None:
    """Return what differs between the runs."""
    columns = columns_of(kept, hidden.size)
    for before, after in zip(full.read, part.read, strict=True):
        if not _same(before[..., columns.to(before.device)], after):
            return f"what {hidden.reader} reads of one group depends on the others"
    if not _same(whole, output):
        return f"its output depends on the groups otherwise than through {hidden.reader}"
    return None


def _same(before: Tensor, after: Tensor) -> bool:
    """Tell whether two computations of some values agree, up to rounding."""
    if before.shape != after.shape or not bool(before.isfinite().all()):
        return False
    close = CLOSE * torch.finfo(before.dtype).eps * float(before.abs().max())
    return bool((before.double() - after.double()).abs().max() <= close)
