"""A second device that computes on the CPU, and refuses to mix its tensors with others.

It shows on a machine with one device whether all tensors of an operation are on the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tnlm.layers import unfolded
from tnlm.targets import checks

SECOND = torch.device("lazy", 0)
"""Its name: a type of torch that needs no driver, and that nothing else here uses."""
BETWEEN = {
    "_to_copy",
    "copy_",
    "set_data",
    "index",
    "index_put_",
    "_index_put_impl_",
    "_has_compatible_shallow_copy_type",
}
"""Operations that take tensors of two devices, as on a GPU."""
READS = (Tensor.tolist, Tensor.untyped_storage)
SET = Tensor.data.__set__


class Second(Tensor):
    """A tensor on the second device; ``held`` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Second:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=SECOND,
        )
        made.held = held
        return made

    def __repr__(self) -> str:
        return f"Second({self.held!r})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in READS:  # without a dispatch
            return func(args[0].held)
        found = torch._C._disabled_torch_function_impl(func, types, args, kwargs or {})
        if func == SET:
            args[0].held = args[1].held
        return found

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    """Run an operation on the CPU, and return its result on the device where it belongs."""
    name, flat = func.overloadpacket.__name__, tree_flatten((args, kwargs))[0]
    tensors = [each for each in flat if isinstance(each, Tensor)]
    second = [each for each in tensors if isinstance(each, Second)]
    others = [each for each in tensors if not isinstance(each, Second) and each.dim()]
    if second and others and name not in BETWEEN:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device")
    asked = next((each for each in flat if isinstance(each, torch.device)), None)
    there = bool(second) if asked is None else asked.type == SECOND.type
    if name == "copy_":
        there = isinstance(args[0], Second)
    if name == "histc" and there:  # of integers too, as on a GPU
        args = args[0].float(), *args[1:]
    near, named = tree_map(_near, (args, kwargs))
    same = {id(each): each for each in others} | {id(each.held): each for each in second}

    def placed(value):
        if not isinstance(value, Tensor):
            return value
        if id(value) in same:  # an operation in place, or a move
            known = same[id(value)]
            if isinstance(known, Second) is there:
                return known
            value = value.clone()
        return Second(value) if there else value

    return tree_map(placed, func(*near, **named))


def _near(value):
    """Return a tensor, or a device, as the CPU knows it."""
    if isinstance(value, torch.device) and value.type == SECOND.type:
        return torch.device("cpu")
    return value.held if isinstance(value, Second) else value


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Values(TorchFunctionMode):
    """Makes tensors from Python values there, which torch does without a dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == SECOND:
            return func(*args, **{**kwargs, "device": None}).to(SECOND)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Make the device usable."""
    with pytest.MonkeyPatch.context() as patch, _Operations(), _Values():
        for module, check in ((checks, "check_plain"), (unfolded, "_held")):
            patch.setattr(module, check, lambda *_: None)  # these are no plain tensors
        # In inference mode torch makes no views of tensors that have no memory.
        patch.setattr(torch, "inference_mode", lambda on=True: torch.set_grad_enabled(not on))
        yield SECOND
