"""Stores statistics of modules, in memory while they are small, otherwise in files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration import cache
from tnlm.calibration.data import Batch, fingerprint
from tnlm.calibration.trail import Trail
from tnlm.errors import CalibrationError
from tnlm.metrics.metric import InputMoment
from tnlm.utils.hashing import model_hash
from tnlm.utils.residency import scratch_of
from tnlm.utils.spill import Slot, Spill

logger = logging.getLogger("tnlm")

IN_MEMORY = 2**25
"""Most bytes of tensors in memory; others are written to a file and read when needed."""

VERSION = 5
"""Version of the layout of cache directories, so that other layouts are not read."""


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
        self._lent: dict[str, tuple[str, float]] = {}
        self.pools: set[str] = set()

    def put(self, leader: str, members: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under the leader's name, for all modules that share them.

        Raises:
            CheckpointError: if the disk is full.
        """
        self.leaders.update(dict.fromkeys(members, leader))
        held = sum(tensor.nbytes for kept in self._memory.values() for tensor in kept.values())
        added = sum(tensor.nbytes for tensor in tensors.values())
        if self._folder is not None:
            self._folder.put(leader, tensors)
        elif held + added <= IN_MEMORY:
            self._memory[leader] = tensors
        else:
            self._slots[leader] = {name: self._spill.put(t) for name, t in tensors.items()}

    def tensor(self, module: str, name: str) -> Tensor:
        """Return a tensor of a module.

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
        found, names = self._find(leader, name)
        if found is None:
            raise CalibrationError(f"{name!r} of {module} was not gathered, only {names}")
        if leader in self._lent and name != "count":
            pool, share = self._lent[leader]
            return torch.lerp(found, self._memory[pool][name].to(found), share)
        return found

    def names(self, module: str) -> tuple[str, ...]:
        """Return the names of a module's tensors."""
        return tuple(self._find(self.leaders[module], "")[1].split(", "))

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

    def _find(self, leader: str, name: str) -> tuple[Tensor | None, str]:
        """Return a tensor, or None with the names of those that exist."""
        if self._folder is not None and leader not in self.pools:
            found = self._folder.tensor(leader, name)
            return found, "" if found is not None else ", ".join(self._folder.names(leader))
        if leader in self._memory:
            return self._memory[leader].get(name), ", ".join(self._memory[leader])
        slots = self._slots[leader]
        return self._spill.take(slots[name]) if name in slots else None, ", ".join(slots)

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
        """Free the cached metric."""
        self._latest = None

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


def open_store(
    cache_dir: str | Path | None,
    tokens: int,
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    kind: object,
) -> Statistics:
    """Return complete statistics from the cache, or else an empty store.

    Args:
        cache_dir: folder of cache entries, each under a hash of its contents; None for no cache.
        tokens: number of tokens in the batches.
        model: the model, whose weights and config are part of the hash.
        modules: dotted names.
        batches: the data.
        kind: the kind of statistics, with everything else that they depend on, hashed by its
            ``repr``.

    Raises:
        CheckpointError: if ``cache_dir`` cannot be used as a cache.
    """
    if cache_dir is None:
        return Statistics(None, tokens, scratch_of(model))
    cache.check_cache(cache_dir)
    place = Path(cache_dir) / content_hash(model, modules, batches, kind)
    cached = Statistics.read(place)
    if cached is not None:
        logger.info("statistics of %d tokens read from the cache", cached.tokens)
        return cached
    scratch = scratch_of(model)
    if scratch is None or not place.is_relative_to(scratch):
        return Statistics(cache.Folder(place), tokens)
    folder = cache.Folder(place, partial=True)  # among the pieces of a run that may go on
    trail = Trail(place.with_name(f"{place.name}.walk"))
    made = Statistics(folder, tokens, scratch, trail)
    made.leaders = (folder.begun() or {}).get("leaders", {})
    return made


def content_hash(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch], kind: object
) -> str:
    """Return a hash of all that statistics depend on: layout, kind, config, weights and data."""
    digest = hashlib.blake2b(repr((VERSION, kind)).encode(), digest_size=16)
    digest.update(model_hash(model).encode())
    digest.update("\n".join(modules).encode())
    digest.update(fingerprint(batches).encode())
    return digest.hexdigest()
