"""LoRA adapters on a model's linear layers: attaches them with PEFT, and removes them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tnlm.errors import ModelError, OptionError, RankError, TargetError
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.packed import PackedLinear
from tnlm.layers.shapes import shape_of
from tnlm.layers.submatrix import SubmatrixLinear
from tnlm.utils.checks import is_whole
from tnlm.utils.mounting import modules_kept

ADAPTER = "default"
"""The name that PEFT gives an adapter."""

_KNOWN = ("Unsupported layer type", "fan_in_fan_out is set to")
"""Warnings of PEFT about cases it handles: layers other than `nn.Linear`, (in, out) weights."""


@dataclass(frozen=True)
class Lora:
    """A low-rank change of a matrix, ``scaling * B @ A`` (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        A: ``(r, in)``.
        B: ``(out, r)``.
        scaling: factor of the product, alpha / r.

    Example:
        >>> lora = Lora(torch.ones(1, 3), torch.ones(2, 1), scaling=2.0)
        >>> lora.params, lora.delta().tolist()
        (5, [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]])
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def params(self) -> int:
        """Number of parameters in A and B, r * (in + out)."""
        return self.A.numel() + self.B.numel()

    def delta(self) -> Tensor:
        """Return the change ``(out, in)``, float64."""
        return self.scaling * (self.B.detach().double() @ self.A.detach().double())


@dataclass(frozen=True)
class Adapter:
    """The LoRA on one module, while it is attached.

    Attributes:
        base: the module.
        A: ``(r, in)``, trainable.
        B: ``(out, r)``, trainable.
        scaling: factor of their product.
    """

    base: nn.Module
    A: nn.Parameter
    B: nn.Parameter
    scaling: float

    def fill(self, lora: Lora) -> None:
        """Copy A and B from a LoRA with the same scaling."""
        with torch.no_grad():
            self.A.copy_(lora.A)
            self.B.copy_(lora.B)

    def merged(self) -> Tensor:
        """Return the weight ``(out, in)`` with the LoRA added, in the LoRA's dtype."""
        A, B = self.A.detach(), self.B.detach()
        return torch.addmm(matrix(self.base).to(B.dtype), B, A, alpha=self.scaling)

    def lora(self) -> Lora:
        """Return copies of A and B."""
        return Lora(self.A.detach().clone(), self.B.detach().clone(), self.scaling)


def matrix(module: nn.Module) -> Tensor:
    """Return the weight of a linear module as ``(out, in)``, a view unless it is factorized.

    Example:
        >>> matrix(Conv1D(5, 3)).shape
        torch.Size([5, 3])
    """
    weight: Any = module.weight
    held: Tensor = weight.detach()
    return held.T if isinstance(module, Conv1D) else held


def size_of(module: nn.Module) -> tuple[int, int]:
    """Return the ``(out, in)`` shape of a linear module of any kind.

    Example:
        >>> size_of(nn.Linear(3, 5))
        (5, 3)
    """
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    return shape_of(module)


def size_at(modules: Mapping[str, nn.Module], name: str) -> tuple[int, int]:
    """Return the ``(out, in)`` shape of a module that is to have a LoRA.

    Raises:
        TargetError: if there is no such module, or it is no linear layer.

    Example:
        >>> size_at({"up": nn.Linear(3, 5)}, "up")
        (5, 3)
    """
    if name not in modules:
        raise TargetError(f"the model has no module {name!r}")
    module = modules[name]
    try:
        return size_of(module)
    except (AttributeError, TypeError, ValueError) as error:
        kind = type(module).__name__
        raise TargetError(
            f"{name} is a {kind}, which takes no LoRA; choose linear layers"
        ) from error


@contextlib.contextmanager
def attached(
    model: nn.Module, ranks: Mapping[str, int], scaling: float, seed: int = 0
) -> Iterator[dict[str, Adapter]]:
    """Attach adapters while a block runs, then restore the model bit for bit.

    Args:
        model: everything but the adapters is frozen in the block.
        ranks: rank of each adapter, by dotted module name.
        scaling: factor of the products.
        seed: draws A.

    Yields:
        The adapters by module name, see :func:`attach`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3))
        >>> with attached(model, {"0": 1}, scaling=2.0) as found:
        ...     found["0"].A.shape, model[0].weight.requires_grad
        (torch.Size([1, 2]), False)
        >>> model
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
        )
    """
    check(model, ranks)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with modules_kept(model, ranks):
            yield attach(model, ranks, scaling, seed)
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)
        vars(model).pop("peft_config", None)


def attach(
    model: nn.Module, ranks: Mapping[str, int], scaling: float, seed: int = 0
) -> dict[str, Adapter]:
    """Attach PEFT's LoRA to modules in place, freeze the rest, and return the adapters.

    B starts at zero, and the rows of A are orthonormal, so that the gradient of B is the weight's,
    projected onto r random directions. Both are at least float32.

    Raises:
        OptionError: if PEFT is not installed.
        ModelError: if the model already has adapters.
        TargetError: if a module does not exist, or PEFT cannot attach a LoRA to it.
        RankError: if a module cannot have its rank.
    """
    check(model, ranks)
    peft = _peft()
    exact = {_escape(name): rank for name, rank in ranks.items()}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=1,
        target_modules=list(ranks),
        rank_pattern=exact,
        alpha_pattern={name: scaling * rank for name, rank in exact.items()},
    )
    plain = peft.tuners.lora.Linear
    made = (FactorizedLinear, SubmatrixLinear, PackedLinear)
    config._register_custom_module(dict.fromkeys(made, plain))
    # PEFT draws its own weights, which are overwritten.
    with torch.random.fork_rng(), warnings.catch_warnings():
        for message in _KNOWN:
            warnings.filterwarnings("ignore", message)
        try:
            peft.inject_adapter_in_model(config, model, ADAPTER)
        except ValueError as error:  # some models read a module's weight instead of calling it
            raise TargetError(f"PEFT cannot attach a LoRA: {error}; ignore such modules") from error
    generator = torch.Generator().manual_seed(seed)
    return {name: _adapter(model.get_submodule(name), generator) for name in ranks}


def _adapter(layer: Any, generator: torch.Generator) -> Adapter:
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    for child in (down, up):
        child.to(torch.promote_types(child.weight.dtype, torch.float32))
    rank, columns = down.weight.shape
    basis = torch.linalg.qr(torch.randn(columns, rank, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        down.weight.copy_(basis.T)
        up.weight.zero_()
    return Adapter(layer.get_base_layer(), down.weight, up.weight, layer.scaling[ADAPTER])


def check(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raise the errors of :func:`attach`, before anything is changed."""
    _peft()
    check_bare(model)
    if not ranks:
        raise TargetError("LoRA needs at least one module; none was given")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, rank in ranks.items():
        most = min(size_at(modules, name))
        if not is_whole(rank) or not 1 <= rank <= most:
            raise RankError(f"LoRA rank={rank!r} at {name}; allowed: 1 to {most}", argument="rank")


def check_bare(model: nn.Module) -> None:
    """Raise `ModelError` if a model has adapters."""
    if hasattr(model, "peft_config"):
        raise ModelError("the model already has adapters; merge or unload them first")


def _escape(name: str) -> str:
    return name.replace(".", r"\.")


def _peft() -> Any:
    try:
        import peft
        import peft.tuners.lora
    except ImportError as error:
        raise OptionError(
            "LoRA needs the package peft, which is not installed: pip install 'tnlm[train]'"
        ) from error
    return peft
