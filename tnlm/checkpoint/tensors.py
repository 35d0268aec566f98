"""Checks that a checkpoint's files hold every tensor of a model, with valid values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tnlm.checkpoint.folder import Stored, read_headers
from tnlm.checkpoint.naming import owner_of
from tnlm.errors import CheckpointError
from tnlm.tensors.gauge import ORDER

if TYPE_CHECKING:  # importing it imports the plug-in, which imports this file
    from transformers import PreTrainedModel

FLOATS = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
"""The dtypes in which weights may be stored, with their names in safetensors."""
WHOLE = {torch.int64: "I64", torch.uint8: "U8", torch.int8: "I8"}
"""The dtypes of row orders and of packed codes, with their names in safetensors."""
SPARE = 2**26
"""Elements allowed beyond four times those in the files, for new heads and position tables."""


class Arrivals:
    """Records the tensors that transformers loads from files, and checks them afterwards.

    transformers itself would cast any dtype and fill missing tensors with random values.

    Args:
        model: its skeleton, with the modules that the checkpoint describes.
        made: names of those modules.
        files: the checkpoint's files, all safetensors.

    Raises:
        CheckpointError: if a file is not safetensors, or the model is far larger than its files.
    """

    def __init__(
        self, model: PreTrainedModel, made: Collection[str], files: Sequence[str] | None
    ) -> None:
        """Read the headers of the files."""
        for file in files or ():
            if not file.endswith(".safetensors"):
                raise CheckpointError(f"{file} is not a safetensors file; tnlm reads no other kind")
        headers = read_headers([Path(file) for file in files or ()])
        self._expected: dict[str, Tensor] = model.state_dict()
        if files:
            _check_size(self._expected, headers)
        self._made = frozenset(made)
        self._parents = _parents(headers)
        self._noted: dict[str, str] = {}
        self._renamed = True

    def note(self, conversion: Any, tensor: Any) -> None:
        """Record one tensor of a file, before it is read.

        Args:
            conversion: transformers' conversion of it.
            tensor: a slice of a safetensors file, or a tensor.

        Raises:
            CheckpointError: if the model cannot hold the tensor in its stored dtype.
        """
        if hasattr(conversion, "operations"):  # merges or splits tensors
            self._renamed = False
            return
        name = conversion.target_patterns[0]
        source = conversion.source_patterns[0]
        if name in self._noted:
            raise CheckpointError(f"the checkpoint has two tensors for {name}; one is {source}")
        kind = tensor.get_dtype() if hasattr(tensor, "get_dtype") else FLOATS.get(tensor.dtype, "")
        wanted = self._expected[name].dtype
        if wanted in FLOATS and kind not in FLOATS.values():
            raise CheckpointError(
                f"{name} is stored as {kind or tensor.dtype}; allowed: {', '.join(FLOATS.values())}"
            )
        if wanted in WHOLE and self._owner(name) and kind != WHOLE[wanted]:
            what = "row orders" if wanted is torch.int64 else "codes"
            allowed = f"allowed for {what}: {WHOLE[wanted]}"
            raise CheckpointError(f"{name} is stored as {kind}; {allowed}")
        self._noted[name] = kind

    def check(self, model: PreTrainedModel) -> None:
        """Check the loaded model: complete, one dtype per module, finite, with valid row orders.

        Tensors are checked one at a time, wherever they are kept.

        Raises:
            CheckpointError: if a tensor is missing or invalid.
        """
        if self._parents and not self._noted and self._renamed:
            raise CheckpointError(
                f"no tensor in the files belongs to a {type(model).__name__}; load the "
                f"{' or '.join(model.config.architectures or ['model'])} that was saved"
            )
        if self._renamed:
            self._check_missing(model)
        self._check_dtypes()
        check_values(model, self._made)
        self._expected.clear()

    def _owner(self, name: str) -> str | None:
        """Return the module made by tnlm that holds a tensor, if any."""
        return owner_of(self._made, name)

    def _check_missing(self, model: PreTrainedModel) -> None:
        """Raise if the files lack a tensor they should hold; draw those of a new head."""
        whole = type(model).__name__ in (model.config.architectures or [])
        ignored = model._keys_to_ignore_on_load_missing or ()
        absent = self._absent(model)
        for name in absent:
            owner = self._owner(name)
            if any(re.search(pattern, name) for pattern in ignored) and owner is None:
                continue
            if owner is None and (whole or _holds(self._parents, model, name.rpartition(".")[0])):
                raise CheckpointError(f"the checkpoint has missing keys: {name}")
            if owner is None:
                continue
            kept = [n for n in self._noted if n.startswith(f"{owner}.")]
            if whole or kept or _in_body(model, owner):
                raise CheckpointError(f"the checkpoint has missing keys: {name}")
            draw(model, name)

    def _absent(self, model: PreTrainedModel) -> list[str]:
        """Return the tensors that no file holds, neither directly nor through a tie."""
        ties = dict(model.all_tied_weights_keys)
        shared = {name: ties.get(name, name) for name in self._expected}
        present = {shared.get(name, name) for name in self._noted}
        return [name for name in self._expected if shared[name] not in present]

    def _check_dtypes(self) -> None:
        """Raise unless all factors of a module have one dtype, as tnlm writes them."""
        found: dict[str, tuple[str, str]] = {}
        for name, kind in self._noted.items():
            owner = self._owner(name)
            if owner is None or name.endswith(".bias") or kind in WHOLE.values():
                continue
            first, before = found.setdefault(owner, (name, kind))
            if kind != before:
                raise CheckpointError(
                    f"{name} is stored as {kind} and {first} as {before}; allowed: one dtype for "
                    "all factors of a module"
                )


def check_values(model: nn.Module, made: Collection[str]) -> None:
    """Raise `CheckpointError` unless every parameter is finite and every row order valid.

    Args:
        model: any model.
        made: names of the modules made by tnlm.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in _tensors(model):
        ours = owner_of(made, name) is not None
        if name.endswith(ORDER) and ours:
            check_order(name, tensor)
        elif tensor.is_floating_point() and (name in parameters or ours):
            check_finite(name, tensor)  # other buffers may be masks of infinities


def draw(model: nn.Module, name: str) -> None:
    """Initialise a head's tensor that no file holds, as transformers does for new heads.

    transformers initialises only modules that it knows; others would be uninitialised memory.

    Raises:
        CheckpointError: if the tensor is not in memory.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    tensor: Any = getattr(module, last)
    if tensor.is_meta:
        raise CheckpointError(f"the checkpoint has missing keys: {name}, and it is offloaded")
    with torch.no_grad():
        if name.endswith(ORDER):
            tensor.copy_(torch.arange(len(tensor)))
        elif last == "bias":
            tensor.zero_()
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)


def check_order(name: str, order: Tensor) -> None:
    """Raise `CheckpointError` unless a tensor is a permutation of its indices.

    Example:
        >>> check_order("left_order", torch.tensor([0, 2, 2]))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: left_order is no permutation of 3 rows: 1 is missing
    """
    if order.dim() == 2:  # of every expert
        for number, each in enumerate(order):
            check_order(f"{name}[{number}]", each)
        return
    if order.dtype != torch.int64 or order.dim() != 1:
        raise CheckpointError(
            f"{name} is {order.dtype} of shape {tuple(order.shape)}, not a row order"
        )
    rows = len(order)
    if rows and not 0 <= int(order.min()) <= int(order.max()) < rows:
        raise CheckpointError(f"{name} orders {rows} rows, but has an index out of range")
    seen = torch.zeros(rows, dtype=torch.bool, device=order.device)
    seen[order] = True
    if not bool(seen.all()):
        missing = int((~seen).nonzero()[0])
        raise CheckpointError(f"{name} is no permutation of {rows} rows: {missing} is missing")


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise `CheckpointError` if a tensor holds NaN or infinity, without copying it.

    Example:
        >>> check_finite("weight", torch.tensor([1.0, float("nan")]))
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: weight has values that are not finite ...
    """
    if tensor.numel() and not all(bool(torch.isfinite(end)) for end in torch.aminmax(tensor)):
        raise CheckpointError(f"{name} has values that are not finite in {tensor.dtype}")


def _check_size(expected: Mapping[str, Tensor], headers: Mapping[str, Stored]) -> None:
    """Raise if a model is far larger than its files: the rest would be random values."""
    there = sum(torch.Size(stored.shape).numel() for stored in headers.values())
    needed = sum(
        tensor.numel()
        for name, tensor in expected.items()
        if name not in headers or headers[name].shape != tuple(tensor.shape)
    )
    if needed > 4 * there + SPARE:
        raise CheckpointError(
            f"config.json asks for {needed:,} parameters that are not in the files, which hold "
            f"{there:,}"
        )


def _in_body(model: PreTrainedModel, module: str) -> bool:
    """Return whether a module belongs to the body, which all classes of a model share."""
    body = model.base_model
    return body is model or module.startswith(f"{model.base_model_prefix}.")


def _holds(parents: Collection[str], model: PreTrainedModel, module: str) -> bool:
    """Return whether the files hold a tensor of a module, with or without the body's prefix."""
    prefix = f"{model.base_model_prefix}."
    return any(n in parents for n in (module, module.removeprefix(prefix), prefix + module))


def _parents(names: Collection[str]) -> set[str]:
    """Return every module that holds one of several tensors, directly or deeper."""
    found: set[str] = set()
    for name in names:
        parts = name.split(".")[:32]  # no real model nests deeper
        found.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return found


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's persistent tensors; offloaded ones are loaded one at a time."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        held = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is None or id(tensor) in seen or name in module._non_persistent_buffers_set:
                continue
            seen.add(id(tensor))
            value = _brought(module, name, tensor)
            if not value.is_meta:  # else the caller wants a skeleton
                yield f"{path}.{name}" if path else name, value.detach()


def _brought(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    if hasattr(tensor, "to_local"):  # distributed over several processes
        local: Tensor = tensor.to_local()
        return local
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        stored: Tensor | None = weights.get(name) if tensor.is_meta and weights else None
        if stored is not None:
            return stored
    return tensor
