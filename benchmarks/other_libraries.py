"""The same factorizations as other libraries run them; each is optional, and imported when asked.

    pip install --no-deps tensorly-torch==0.5.0 linear_operator==0.6.1 jaxtyping typeguard
    pip install peft

Modes and ranks are those of our spec, numbers are random, and nothing has a bias: tensorly-torch
would add a random one to a layer that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_layers import SCALE
from torch import Tensor, nn

Maker = Callable[[Any, torch.dtype], nn.Module]


def tensorly_torch(factorization: str, implementation: str) -> Maker:
    """Return what makes a layer of tensorly-torch from our spec.

    Args:
        factorization: ``"tucker"``, or ``"blocktt"``, its name of our tensor train.
        implementation: ``"factorized"``, one einsum over the input and all factors, or
            ``"reconstructed"``, the matrix rebuilt at every call.
    """

    def make(spec: Any, dtype: torch.dtype) -> nn.Module:
        # Importing it makes torch tensorly's backend for the whole process; ours does not mind.
        from tltorch import FactorizedLinear

        layer: nn.Module = FactorizedLinear(
            in_tensorized_features=spec.in_split,
            out_tensorized_features=spec.out_split,
            bias=False,
            factorization=factorization,
            rank=[1, *spec.ranks, 1] if factorization == "blocktt" else list(spec.ranks),
            implementation=implementation,
            dtype=dtype,
        )
        return layer

    return make


class _LoKr(nn.Module):
    """PEFT's adapter without the layer that it adapts: the product rebuilt, then applied."""

    def __init__(self, spec: Any, dtype: torch.dtype) -> None:
        from peft import LoKrConfig
        from peft.tuners.lokr.layer import Linear

        super().__init__()
        (a, b), (c, d) = spec.out_split, spec.in_split
        rank = max(a * b, c * d)  # so large that neither factor is factored again
        config = LoKrConfig(r=rank, alpha=rank, init_weights=False)
        base = nn.Linear(c * d, a * b, bias=False, device="meta")
        self.adapter = Linear(base, "default", config=config, r=rank, alpha=rank)
        for factor, sizes in (("lokr_w1", (a, c)), ("lokr_w2", (b, d))):
            values = nn.Parameter(SCALE * torch.randn(sizes, dtype=dtype))
            getattr(self.adapter, factor)["default"] = values

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.adapter.get_delta_weight("default"))


class _Operator(nn.Module):
    """linear_operator's lazy Kronecker product, which multiplies columns from the left."""

    def __init__(self, spec: Any, dtype: torch.dtype) -> None:
        from linear_operator.operators import KroneckerProductLinearOperator

        super().__init__()
        sizes = zip(spec.out_split, spec.in_split, strict=True)
        factors = [nn.Parameter(SCALE * torch.randn(size, dtype=dtype)) for size in sizes]
        self.factors = nn.ParameterList(factors)
        self.operator = KroneckerProductLinearOperator(*factors)

    def forward(self, x: Tensor) -> Tensor:
        applied: Tensor = (self.operator @ x.mT).mT
        return applied


OTHERS: dict[str, dict[str, Maker]] = {
    "tensor-train": {
        "tltorch, factored": tensorly_torch("blocktt", "factorized"),
        "tltorch, rebuilt": tensorly_torch("blocktt", "reconstructed"),
    },
    "tucker": {
        "tltorch, factored": tensorly_torch("tucker", "factorized"),
        "tltorch, rebuilt": tensorly_torch("tucker", "reconstructed"),
    },
    "kronecker-term": {"PEFT LoKr": _LoKr, "linear_operator": _Operator},
}
"""By format, the libraries that have it and what makes one of their layers."""
