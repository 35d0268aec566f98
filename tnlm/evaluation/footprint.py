"""Bytes that a model takes: for its weights, while it runs, and for its files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tnlm.errors import EvaluationError
from tnlm.utils.claim import temporary_folder
from tnlm.utils.memory import release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATM = Path("/proc/self/statm")
_PAUSE = 0.0005


def weight_bytes(model: nn.Module) -> int:
    """Count the bytes of all parameters and buffers, shared ones once.

    Example:
        >>> weight_bytes(nn.Linear(3, 2))
        32
    """
    tensors = [*model.parameters(), *model.buffers()]
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(stored.values())


def resident_bytes() -> int | None:
    """Return the resident memory of the process, or None if the system does not report it."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def working_bytes(task: Callable[[], object], device: torch.device) -> int | None:
    """Run a task and return the peak growth of memory, or None if unknown.

    On CUDA, the allocator's count is exact. On a CPU, the process's resident memory is read every
    half millisecond, which misses shorter peaks; freed memory is released first.

    Args:
        task: the function to run, e.g. a forward pass.
        device: where it allocates memory.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        task()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    release()
    start = resident_bytes()
    if start is None:
        task()
        return None
    return max(_watch(task) - start, 0)


def _watch(task: Callable[[], object]) -> int:
    """Run a task and return the largest resident memory observed."""
    most, done = [resident_bytes() or 0], threading.Event()

    def look() -> None:
        while not done.wait(_PAUSE):
            most[0] = max(most[0], resident_bytes() or 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        task()
    finally:
        done.set()
        thread.join()
    return max(most[0], resident_bytes() or 0)


def disk_bytes(
    model: PreTrainedModel, tokenizer: Any = None, directory: str | Path | None = None
) -> int:
    """Return the bytes of a saved model's files.

    Args:
        model: compressed or dense; saved to a temporary directory unless ``directory`` is given.
        tokenizer: saved with the model, if given.
        directory: where the model is already saved.
    """
    if directory is not None:
        folder = Path(directory)
        if not folder.is_dir():
            raise EvaluationError(f"directory={str(directory)!r} is not a directory")
        return _total(folder)
    from tnlm.checkpoint.saving import save
    from tnlm.checkpoint.transformers_plugin import description

    with temporary_folder() as scratch:
        folder = scratch / "model"
        if description(model) is not None:
            save(model, folder, tokenizer=tokenizer)
        else:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        return _total(folder)


def _total(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
