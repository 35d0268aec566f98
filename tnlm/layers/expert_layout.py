"""The layout of a mixture's experts in the 3-D parameters of one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
JOINT = "gate_up_proj"
"""Name of the parameter that holds gate and up matrices together."""
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes that transformers' ``use_experts_implementation`` sets on modules."""


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of one module, all of one shape.

    Attributes:
        experts: number of experts, E.
        hidden: size of an expert's inputs and outputs.
        inner: number of channels between its matrices.
        gated: whether experts have a gate beside ``up``; one parameter then holds both.
        transposed: whether parameters are ``(E, in, out)`` instead of ``(E, out, in)``.
        concatenated: whether gates are above ups, instead of interleaved row by row.
        biased: whether every matrix has a bias, ``(E, out)``.

    Example:
        >>> layout = ExpertLayout(experts=4, hidden=8, inner=6)
        >>> layout.shapes
        {'gate_proj': (6, 8), 'up_proj': (6, 8), 'down_proj': (8, 6)}
    """

    experts: int
    hidden: int
    inner: int
    gated: bool = True
    transposed: bool = False
    concatenated: bool = True
    biased: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The ``(out, in)`` shape of every matrix of an expert, by name."""
        reads, writes = (self.inner, self.hidden), (self.hidden, self.inner)
        return ({GATE: reads} if self.gated else {}) | {UP: reads, DOWN: writes}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in the module."""
        weights = (JOINT if self.gated else UP, DOWN)
        return weights + tuple(f"{name}_bias" for name in weights if self.biased)

    def holder(self, projection: str) -> str:
        """Return the name of the parameter that holds a matrix.

        Example:
            >>> ExpertLayout(experts=4, hidden=8, inner=6).holder("up_proj")
            'gate_up_proj'
        """
        return JOINT if self.gated and projection != DOWN else projection

    def weight(self, module: nn.Module, projection: str) -> Tensor:
        """Return one matrix of all experts, ``(E, out, in)``, as a view of the parameter."""
        held: Tensor = getattr(module, self.holder(projection)).detach()
        return self._rows(held.transpose(1, 2) if self.transposed else held, projection)

    def bias(self, module: nn.Module, projection: str) -> Tensor | None:
        """Return one bias of all experts, ``(E, out)``, as a view, or None without biases."""
        if not self.biased:
            return None
        held: Tensor = getattr(module, f"{self.holder(projection)}_bias").detach()
        return self._rows(held, projection)

    def _rows(self, held: Tensor, projection: str) -> Tensor:
        """Return the rows ``(E, rows, ...)`` of a matrix."""
        if not self.gated or projection == DOWN:
            return held
        if not self.concatenated:
            return held[:, (projection == UP) :: 2]
        return held[:, self.inner :] if projection == UP else held[:, : self.inner]

    def join(self, gate: Tensor, up: Tensor) -> Tensor:
        """Join outputs ``(..., channels)`` of gates and ups in the order of the module's own code.

        Example:
            >>> layout = ExpertLayout(experts=4, hidden=8, inner=2, concatenated=False)
            >>> layout.join(torch.tensor([1, 2]), torch.tensor([3, 4])).tolist()
            [1, 3, 2, 4]
        """
        if self.concatenated:
            return torch.cat([gate, up], dim=-1)
        return torch.stack([gate, up], dim=-1).flatten(-2)

    def stacked(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the module's parameters by name, from ``(E, out, in)`` matrices and biases."""
        names = list(self.shapes)
        found = {}
        for parameter in self.parameters:
            given = biases if parameter.endswith("_bias") else weights
            parts = [given[n] for n in names if self.holder(n) == parameter.removesuffix("_bias")]
            whole = parts[0] if len(parts) == 1 else self._interlaced(*parts)
            turned = self.transposed and whole.dim() == 3
            found[parameter] = (whole.transpose(1, 2) if turned else whole).contiguous()
        return found

    def _interlaced(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.concatenated:
            return torch.cat([gate, up], dim=1)
        return torch.stack([gate, up], dim=2).flatten(1, 2)


def layout_of(module: nn.Module) -> ExpertLayout | str | None:
    """Return the layout of a module's experts, or why it is unknown.

    It is known for classes that transformers marks with ``use_experts_implementation``.

    Returns:
        The layout; for experts of another kind, the reason as text; for modules without a 3-D
        parameter, None.
    """
    held = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    if not held:
        return None
    if not all(isinstance(getattr(module, flag, None), bool) for flag in FLAGS):
        return f"{type(module).__name__} is not laid out as transformers' experts are"
    marked: Any = module
    flags = {"gated": marked.has_gate, "transposed": marked.is_transposed}
    flags |= {"concatenated": marked.is_concatenated, "biased": marked.has_bias}
    up, down = held.get(JOINT if marked.has_gate else UP), held.get(DOWN)
    if up is None or down is None or len(held) > 2:
        return f"{type(module).__name__} has the 3-D parameters {', '.join(held)}"
    shapes = [
        tuple(p.transpose(1, 2).shape if marked.is_transposed else p.shape) for p in (up, down)
    ]
    (count, hidden, inner), parts = shapes[1], 2 if marked.has_gate else 1
    if shapes[0] != (count, parts * inner, hidden):
        return f"{type(module).__name__} holds matrices of {shapes[0]} and {shapes[1]}"
    layout = ExpertLayout(count, hidden, inner, **flags)
    own = {n for n, _ in module.named_parameters(recurse=False)}
    if own != set(layout.parameters):
        return f"{type(module).__name__} has the parameters {', '.join(sorted(own))}"
    return layout
