"""Which process fits and writes which blocks."""

from __future__ import annotations

from collections.abc import Sequence

from tnlm.compression.fitting import Fitting
from tnlm.compression.request import Request
from tnlm.errors import CheckpointError, OptionError
from tnlm.parallel.packing import pack
from tnlm.parallel.workers import Workers
from tnlm.streaming.pieces import Pieces
from tnlm.targets.base import Target
from tnlm.targets.effort import size_of
from tnlm.utils.memory import release


def check_shared(request: Request, workers: Workers) -> None:
    """Raise `OptionError` if a request cannot be shared out block by block."""
    if workers.size > 1 and request.cascade != "none":
        raise OptionError(
            f"cascade={request.cascade!r} fits one block after the other, so that several "
            "processes cannot share them from files to files; use one process, or cascade='none'",
            argument="cascade",
        )


def owners(units: Sequence[Target], blocks: Sequence[str], size: int) -> dict[str | None, int]:
    """Return the process of every block, and of all outside of blocks (under None) the first.

    Blocks whose matrices are fitted together have the same.

    Args:
        units: the targets.
        blocks: names of the blocks.
        size: number of processes.

    Example:
        >>> from tnlm.targets.matrix import MatrixTarget
        >>> units = [MatrixTarget(f"h.{i}.up", f"h.{i}.up", (8, 4)) for i in range(3)]
        >>> owners(units, ["h.0", "h.1", "h.2"], 2)
        {'h.0': 0, 'h.1': 1, 'h.2': 0, None: 0}
    """
    groups = {block: block for block in blocks}
    costs = dict.fromkeys(blocks, 0.0)
    for unit in units:
        inside = [b for b in dict.fromkeys(_block(m, blocks) for m in unit.members) if b]
        for block in inside:
            joined = groups[block]
            groups = {name: groups[inside[0]] if g == joined else g for name, g in groups.items()}
        if inside:
            costs[inside[0]] += size_of(unit).cost
    taken = pack([costs[b] for b in blocks], [groups[b] for b in blocks], size)
    return {**dict(zip(blocks, taken, strict=True)), None: 0}


def share_of(
    units: Sequence[Target], blocks: Sequence[str], workers: Workers
) -> tuple[list[str], list[Target]]:
    """Return the blocks and the targets of this process."""
    found, rank = owners(units, blocks, workers.size), workers.rank
    own = [unit for unit in units if found[_block(unit.members[0], blocks)] == rank]
    return [block for block in blocks if found[block] == rank], own


def fit_share(
    fitting: Fitting, pieces: Pieces, units: Sequence[Target], workers: Workers, title: str | None
) -> None:
    """Fit the targets of this process and write its blocks, and take over those of the others.

    Args:
        fitting: fits targets by itself.
        pieces: writes the blocks of this process.
        units: the targets of this process.
        workers: all processes.
        title: title of the progress bar; None for no bar.

    Raises:
        CheckpointError: if a block of another process is not there.
    """
    workers.gather(None)  # until all have seen the same pieces of an earlier run
    for _ in fitting.fit_all([unit for unit in units if fitting.is_due(unit)], title):
        release()
        pieces.take()
    pieces.take()
    workers.gather(None)  # until all blocks are written
    pieces.restore()
    if pieces.left:
        raise CheckpointError(
            f"{pieces.folder} has no whole file of {', '.join(pieces.left)}, which other processes "
            "write; let all processes use one folder, then run again: finished blocks are kept"
        )


def _block(target: Target, blocks: Sequence[str]) -> str | None:
    return next((block for block in blocks if target.module.startswith(f"{block}.")), None)
