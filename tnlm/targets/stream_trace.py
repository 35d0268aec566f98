"""Runs a model on a few tokens, and notes what its norms and linear layers compute."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from tnlm.errors import ModelError
from tnlm.targets.ends import input_table
from tnlm.utils.training_flags import modes_kept

TOKENS = 8
"""Number of tokens of a trial."""


@torch.no_grad()
def trial(model: PreTrainedModel, hooks: Any = ExitStack) -> Tensor:
    """Return a model's logits for a few tokens.

    Args:
        model: runs in evaluation mode.
        hooks: returns a context of the run.

    Raises:
        ModelError: if the model fails, or computes no logits, only zeros, or any that are not
            finite.
    """
    table: Any = input_table(model)
    ids = (torch.arange(TOKENS) % table.num_embeddings).unsqueeze(0).to(table.weight.device)
    with modes_kept(model), hooks():
        model.eval()
        try:
            found = model(input_ids=ids).get("logits")
        except Exception as error:  # the model's code may raise anything
            raise ModelError(
                f"{type(model).__name__} cannot be run on tokens alone ({error})"
            ) from error
    if found is None:
        wrong = "no logits"
    elif not bool(found.isfinite().all()):
        wrong = "logits that are not finite"
    else:
        wrong = "" if bool(found.any()) else "logits that are all zero"
    if wrong:
        raise ModelError(f"{type(model).__name__} computes {wrong}; give a model with its head")
    logits: Tensor = found
    return logits


@dataclass(frozen=True)
class Call:
    """A call's input and output."""

    given: Tensor
    made: Tensor


class Trace:
    """The parameters that a run read, and its calls of norms and linear layers.

    Args:
        model: the model.
        width: of its residual stream.

    Attributes:
        read: ids of the parameters read, by a module that is called or otherwise.
        linears: calls of every linear layer, by name.
    """

    def __init__(self, model: nn.Module, width: int) -> None:
        self._model, self.width = model, width
        self.read: set[int] = set()
        self.linears: dict[str, list[Call]] = {}
        self._normed: dict[str, list[Call]] = {}

    def hooks(self) -> ExitStack:
        """Note the calls as long as the context lasts."""
        stack = ExitStack()
        for name, module in self._model.named_modules():
            handle = module.register_forward_hook(partial(self._note, name))
            stack.callback(handle.remove)
        stack.enter_context(_Reads(self.read))
        return stack

    def norms(self) -> dict[str, tuple[str, ...]]:
        """Return the linear layers that were given each norm's output, or a part of it.

        Norms of what a reader computes are left out: they work inside of a sub-layer, as those of
        queries and keys do.
        """
        found = {norm: self._reading(calls) for norm, calls in self._normed.items()}
        readers = {reader for reading in found.values() for reader in reading}
        inner = _memory(call.made for reader in readers for call in self.linears[reader])
        return {
            norm: reading
            for norm, reading in found.items()
            if inner.isdisjoint(_memory(call.given for call in self._normed[norm]))
        }

    def _reading(self, calls: list[Call]) -> tuple[str, ...]:
        made = _memory(call.made for call in calls)
        return tuple(
            name
            for name, called in self.linears.items()
            if not made.isdisjoint(_memory(call.given for call in called))
        )

    def _is_norm(self, module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        is_leaf = not any(True for _ in module.children())
        return is_leaf and isinstance(weight, Tensor) and weight.shape == (self.width,)

    def _note(self, name: str, module: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        if not given or not isinstance(made, Tensor):  # as a router does; it is no plain layer
            return
        if isinstance(module, nn.Linear):
            self.linears.setdefault(name, []).append(Call(given[0], made))
        elif self._is_norm(module):
            self._normed.setdefault(name, []).append(Call(given[0], made))


class _Reads(TorchDispatchMode):
    """Notes the ids of all tensors that operations are given."""

    def __init__(self, read: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._read = read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._read.update(id(given) for given in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _memory(tensors: Iterable[Tensor]) -> set[int]:
    """Return where tensors lie; views lie where their base does."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
