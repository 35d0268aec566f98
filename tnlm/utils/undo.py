"""All or nothing: failed work is undone, even if the undoing is interrupted."""

from __future__ import annotations

import functools
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

P = ParamSpec("P")
T = TypeVar("T")

_HOLDERS = (nn.Module, PreTrainedConfig, GenerationConfig, QuantizationConfigMixin)
"""The objects that make up a model, whose attributes a snapshot records."""


def attempt(work: Callable[[], T], undo: Callable[[], None]) -> T:
    """Run ``work`` and return its result; if it fails, undo it and raise the error.

    A ``with`` block cannot do this: an interruption may come between its end and the first line
    of ``__exit__``. Here, every line that may fail is inside a ``try``.

    Args:
        work: all of the work; nothing runs after it.
        undo: runs twice, so that it completes despite a second interruption. It must do nothing
            if there is nothing (left) to undo.

    Example:
        >>> done = []
        >>> attempt(lambda: done.append("work"), done.clear)
        >>> try:
        ...     attempt(lambda: 1 / 0, done.clear)
        ... except ZeroDivisionError:
        ...     print(done)
        []
    """
    try:
        try:
            return work()
        except BaseException as error:
            with signals_held():
                _end(error)
                undo()
            raise
    except BaseException as error:
        with signals_held():
            _end(error)
            undo()
        raise


def _end(error: BaseException) -> None:
    """Clear the frames of a failure, with all pending work in them.

    A context manager whose end was interrupted is a suspended generator in such a frame; it would
    run its ``finally`` when the error is freed, which is after the undo.
    """
    found: BaseException | None = error
    while found is not None:
        traceback.clear_frames(found.__traceback__)
        found = found.__context__


class _Later:
    """A signal handler that only counts; the original handler is called afterwards."""

    def __init__(self, before: Any) -> None:
        self.before, self.count = before, 0

    def __call__(self, *_: object) -> None:
        self.count += 1


@contextmanager
def signals_held() -> Iterator[None]:
    """Defer Ctrl-C and termination until a block ends, in the main thread.

    Signals that are left to the system's default handling are not deferred.
    """
    held: dict[signal.Signals, _Later] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if callable(before):  # it may be ours, left by an interrupted end
                    held[number] = _Later(getattr(before, "before", before))
                    signal.signal(number, held[number])
        yield
    finally:
        for number, later in held.items():
            signal.signal(number, later.before)
        for number, later in held.items():
            if later.count:
                signal.raise_signal(number)


class Snapshot:
    """Records everything about a model but the values of its tensors, and restores it.

    Modules, their attributes and hooks, configs, training flags, ``requires_grad`` and gradients
    become the same objects as before; anything added is removed.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> before = Snapshot(model)
        >>> model[0] = nn.Identity()
        >>> _ = model.eval()
        >>> before.restore()
        >>> model[0], model.training
        (Linear(in_features=2, out_features=2, bias=True), True)
    """

    def __init__(self, model: nn.Module) -> None:
        """Record a model."""
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, bool, Tensor | None]] = []
        seen: set[int] = set()
        waiting: list[Any] = [model]
        while waiting:
            found = waiting.pop()
            if id(found) in seen:
                continue
            seen.add(id(found))
            if isinstance(found, _HOLDERS):
                waiting.append(vars(found))
            elif isinstance(found, dict | list | set):
                self._containers.append((found, found.copy()))
                waiting.extend(found.values() if isinstance(found, dict) else found)
            elif isinstance(found, Tensor) and found.is_leaf:
                self._tensors.append((found, found.requires_grad, found.grad))

    def restore(self) -> None:
        """Restore everything."""
        for container, before in self._containers:
            container.clear()
            container.extend(before) if isinstance(container, list) else container.update(before)
        for tensor, needed, gradient in self._tensors:
            if tensor.requires_grad != needed:
                tensor.requires_grad_(needed)
            if tensor.grad is not gradient:
                tensor.grad = gradient


def leaves_model(function: Callable[P, T]) -> Callable[P, T]:
    """Restore every model passed to a function if the function fails.

    The function itself must restore values of tensors, see `tnlm.layers.swap.Swap`.
    """

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        given = (*args, *kwargs.values())
        before = [Snapshot(model) for model in given if isinstance(model, nn.Module)]
        grad = torch.is_grad_enabled()

        def undo() -> None:
            torch.set_grad_enabled(grad)  # the end of a `no_grad` may have been interrupted
            for snapshot in before:
                snapshot.restore()

        return attempt(lambda: function(*args, **kwargs), undo)

    return guarded
