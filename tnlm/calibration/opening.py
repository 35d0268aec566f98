"""Opens the store for statistics of a kind: a complete one from a cache, or else an empty one."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration import cache
from tnlm.calibration.data import Batch, fingerprint
from tnlm.calibration.store import Statistics
from tnlm.calibration.trail import Trail
from tnlm.errors import CheckpointError
from tnlm.parallel.workers import ALONE, Workers
from tnlm.utils.hashing import model_hash
from tnlm.utils.residency import scratch_of

logger = logging.getLogger("tnlm")

VERSION, WHOLE = 6, 5
"""Version of the layout of cache directories, and an earlier one, with whole matrices in float64,
that is read as well."""


class Reader(Statistics):
    """Statistics that another process writes to a cache, read from there when complete.

    Args:
        place: the cache entry.
        tokens: number of tokens.
        scratch: where temporary files are.
        trail: where the walk keeps how far it has come.
    """

    def __init__(
        self, place: Path, tokens: int, scratch: Path | None = None, trail: Trail | None = None
    ) -> None:
        """Start without tensors."""
        super().__init__(None, tokens, scratch, trail)
        self._place = place

    def put(self, leader: str, members: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
        """Keep only the names; the other process keeps the same tensors."""
        self.leaders.update(dict.fromkeys(members, leader))

    def save_index(self) -> None:
        """Read the complete statistics.

        Raises:
            CheckpointError: if they are not there.
        """
        found = Statistics.read(self._place)
        if found is None:
            raise CheckpointError(
                f"{self._place} was written by another process, but is not seen by this one; "
                "cache_dir= must be on a disk that all processes share",
                argument="cache_dir",
            )
        self._folder, self.leaders, self.complete = found._folder, found.leaders, True
        self.trail.clear()


def open_store(
    cache_dir: str | Path | None,
    tokens: int,
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    kind: object,
    workers: Workers = ALONE,
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
        workers: if there are several processes, the first writes the cache for all.

    Raises:
        CheckpointError: if ``cache_dir`` cannot be used as a cache.
    """
    if cache_dir is None:
        return Statistics(None, tokens, scratch_of(model))
    cache.check_cache(cache_dir)
    about = content(model, modules, batches)
    for version in (WHOLE, VERSION):
        place = Path(cache_dir) / content_hash(version, kind, about)
        cached = Statistics.read(place)
        if all(workers.gather(cached is not None)) and cached is not None:
            logger.info("statistics of %d tokens read from the cache", cached.tokens)
            return cached
    scratch = scratch_of(model)
    goes_on = scratch is not None and place.is_relative_to(scratch)
    way = place.with_name(f"{place.name}.walk-{workers.rank}-of-{workers.size}")
    trail = Trail(way if goes_on else None, workers)
    if workers.rank > 0:
        return Reader(place, tokens, scratch, trail)
    if not goes_on:
        return Statistics(cache.Folder(place), tokens)
    folder = cache.Folder(place, partial=True)  # among the pieces of a run that may go on
    made = Statistics(folder, tokens, scratch, trail)
    made.leaders = (folder.begun() or {}).get("leaders", {})
    return made


def content(model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]) -> bytes:
    """Return what statistics are of: hashes of config, weights and data, and names of modules."""
    return "".join((model_hash(model), "\n".join(modules), fingerprint(batches))).encode()


def content_hash(version: int, kind: object, about: bytes) -> str:
    """Return a hash of all that statistics depend on: their layout and kind, and the content."""
    return hashlib.blake2b(repr((version, kind)).encode() + about, digest_size=16).hexdigest()
