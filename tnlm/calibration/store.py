"""Stores statistics of modules, in memory while they are small, otherwise in files."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tnlm.calibration import cache
from tnlm.calibration.trail import Trail
from tnlm.errors import CalibrationError
from tnlm.metrics.metric import InputMoment
from tnlm.tensors.symmetric import packed, unpacked
from tnlm.utils.spill import Slot, Spill

logger = logging.getLogger("tnlm")

IN_MEMORY = 2**25
"""Most bytes of tensors in memory; others are written to a file and read when needed."""

HALVES = {"moment": torch.float32, "gradient": torch.int16}
"""Symmetric matrices of which one half is stored, rounded less than their products are, and less
than the choice of the data changes them. Moments of inputs may be nearly singular; those of
gradients never weight errors without the mean of their diagonal."""

DIAGONAL = ".diagonal"
"""Added to the name of a symmetric matrix for that of its diagonal."""


class Statistics:
    """Named tensors of modules; modules with the same inputs share their tensors.

    Args:
        folder: cache folder for the tensors; without one, they go to a temporary file when they
            are large.
        tokens: number of tokens.
        scratch: where the temporary file is; None for the system's temporary directory.
        trail: where the walk that computes them keeps how far it has come.

    Example:
        >>> import torch
        >>> found = Statistics(tokens=4)
        >>> found.put("q_proj", ["q_proj", "k_proj"], {"moment": torch.eye(2).double()})
        >>> found.tensor("k_proj", "moment").shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        folder: cache.Folder | None = None,
        tokens: int = 0,
        scratch: Path | None = None,
        trail: Trail | None = None,
    ) -> None:
        """Start without tensors."""
        self.trail = trail or Trail(None)
        self.tokens = tokens
        self.leaders: dict[str, str] = {}
        self.complete = False
        self._folder = folder
        self._memory: dict[str, Mapping[str, Tensor]] = {}
        self._spill = Spill(scratch)
        self._slots: dict[str, dict[str, Slot]] = {}
        self._latest: tuple[str, InputMoment] | None = None
        self._recent: dict[str, tuple[str, Tensor]] = {}
        self._lent: dict[str, tuple[str, float]] = {}
        self.pools: set[str] = set()

    def put(self, leader: str, members: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under the leader's name, for all modules that share them.

        Raises:
            CheckpointError: if the disk is full.
        """
        self.leaders.update(dict.fromkeys(members, leader))
        tensors = _in_halves(tensors)
        held = sum(tensor.nbytes for kept in self._memory.values() for tensor in kept.values())
        added = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is not None:
            self._folder.put(leader, tensors)
        elif held + added <= IN_MEMORY:
            self._memory[leader] = tensors
        else:
            self._slots[leader] = {name: self._spill.put(t) for name, t in tensors.items()}

    def tensor(self, module: str, name: str) -> Tensor:
        """Return a tensor of a module, which is not to be changed.

        For inputs: ``moment`` E[x x.T] ``(in, in)``, ``mean`` E[x] ``(in,)``, ``magnitude`` E|x|
        ``(in,)``, and ``count``, the number of inputs. For gradients: ``gradient`` E[g g.T]
        ``(out, out)`` and ``fisher`` ``(out, in)``.

        Raises:
            CalibrationError: if it was not gathered.
            CheckpointError: if it cannot be read, or has changed since it was written.
        """
        leader = self.leaders.get(module)
        if leader is None:
            raise CalibrationError(f"no statistics of {module} were gathered")
        found = self._find(leader, name)
        if found is None:
            names = ", ".join(self.names(module))
            raise CalibrationError(f"{name!r} of {module} was not gathered, only {names}")
        if leader in self._lent and name != "count":
            pool, share = self._lent[leader]
            return torch.lerp(found, self._memory[pool][name].to(found), share)
        return found

    def names(self, module: str) -> tuple[str, ...]:
        """Return the names of a module's tensors."""
        leader = self.leaders[module]
        if leader in self._memory:
            names = list(self._memory[leader])
        elif self._folder is not None:
            names = self._folder.names(leader)
        else:
            names = list(self._slots[leader])
        return tuple(name for name in names if not name.endswith(DIAGONAL))

    def count(self, module: str) -> int:
        """Return the number of a module's inputs; 0 if its statistics are all borrowed."""
        return 0 if self.leaders[module] in self.pools else int(self.tensor(module, "count"))

    def pool(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors for :meth:`lend` to share with modules, but not in a cache."""
        self._memory[name] = tensors
        self.pools.add(name)

    def lend(self, module: str, pool: str, share: float) -> None:
        """Mix a fraction of a pool's tensors into a module's; use all if it has no own tensors."""
        if module in self.leaders:
            self._lent[self.leaders[module]] = pool, share
        else:
            self.leaders[module] = pool

    def _find(self, leader: str, name: str) -> Tensor | None:
        """Return a tensor, or None; the last matrix of a name stays, for modules with one input."""
        if name not in HALVES:
            return self._stored(leader, name)
        if self._recent.get(name, ("",))[0] != leader:
            self._recent.pop(name, None)  # free the previous one before reading the next
            found = self._stored(leader, name)
            if found is None:
                return None
            diagonal = self._stored(leader, name + DIAGONAL)
            self._recent[name] = leader, found if diagonal is None else unpacked(found, diagonal)
        return self._recent[name][1]

    def _stored(self, leader: str, name: str) -> Tensor | None:
        """Return a tensor as it was stored, or None."""
        if leader in self._memory:
            return self._memory[leader].get(name)
        if self._folder is not None:
            return self._folder.tensor(leader, name)
        slots = self._slots[leader]
        return self._spill.take(slots[name]) if name in slots else None

    def moment(self, module: str) -> Tensor:
        """Return the second moment ``(in, in)`` of a module's input, float64."""
        return self.tensor(module, "moment")

    def metric(self, module: str) -> InputMoment:
        """Return the metric of a module's input; the last one is cached, with its square root."""
        leader = self.leaders[module]
        if self._latest is None or self._latest[0] != leader:
            self._latest = None  # free the previous one before reading the next
            self._latest = leader, InputMoment(self.moment(module))
        return self._latest[1]

    def forget(self) -> None:
        """Free the cached metric and matrices."""
        self._latest = None
        self._recent.clear()

    def mark(self) -> None:
        """Note what there is so far, for a run that goes on after this process was killed."""
        if self._folder is not None:
            self._folder.mark({"leaders": self.leaders})

    def save_index(self) -> None:
        """Mark the statistics as complete; in a cache, for other processes too."""
        self.complete = True
        if self._folder is not None:
            self._folder.finish({"tokens": self.tokens, "leaders": self.leaders})
        self.trail.clear()

    @classmethod
    def read(cls, place: Path) -> Statistics | None:
        """Return the statistics of a complete cache entry, or None."""
        found = cache.read(place)
        if found is None:
            return None
        made = cls(found[0], found[1]["tokens"])
        made.leaders = found[1]["leaders"]
        made.complete = True
        return made


def _in_halves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with only the lower halves of those that are symmetric."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name in HALVES and tensor.dim() == 2:
            found[name], found[name + DIAGONAL] = packed(tensor, HALVES[name])
    return found
