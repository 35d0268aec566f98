"""How the experts of a mixture lie in the 3-D parameters of one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
JOINT = "gate_up_proj"
"""Name of the parameter that holds gates and ups together."""
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""What transformers' ``use_experts_implementation`` leaves on the modules of a class."""


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of one module, all of one shape.

    Attributes:
        experts: how many there are, E.
        hidden: size of what an expert reads and writes.
        inner: channels between its matrices.
        gated: whether a gate stands beside ``up``; both then lie in one parameter.
        transposed: parameters are ``(E, in, out)`` instead of ``(E, out, in)``.
        concatenated: gates lie above ups; else row by row in turn.
        biased: every matrix has a bias, ``(E, out)``.

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
        """The ``(out, in)`` shape of every matrix of an expert, by its name."""
        reads, writes = (self.inner, self.hidden), (self.hidden, self.inner)
        return ({GATE: reads} if self.gated else {}) | {UP: reads, DOWN: writes}

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters in the module."""
        weights = (JOINT if self.gated else UP, DOWN)
        return weights + tuple(f"{name}_bias" for name in weights if self.biased)

    def holder(self, projection: str) -> str:
        """Return the name of the parameter that a matrix lies in.

        Example:
            >>> ExpertLayout(experts=4, hidden=8, inner=6).holder("up_proj")
            'gate_up_proj'
        """
        return JOINT if self.gated and projection != DOWN else projection

    def weight(self, module: nn.Module, projection: str) -> Tensor:
        """Return one matrix of every expert, ``(E, out, in)``, a view of the module's parameter."""
        held: Tensor = getattr(module, self.holder(projection)).detach()
        return self._rows(held.transpose(1, 2) if self.transposed else held, projection)

    def bias(self, module: nn.Module, projection: str) -> Tensor | None:
        """Return one bias of every expert, ``(E, out)``, a view; None without biases."""
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
        """Return outputs ``(..., channels)`` of gates and ups as the module's own code has them.

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
        """Return the module's parameters by name, given ``(E, out, in)`` matrices and biases."""
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
    """Return how the experts of a module lie in it, or why that is not known.

    Known are the classes that transformers marks with ``use_experts_implementation``.

    Returns:
        The layout; the reason as a text for a module of experts of another kind; None for any
        module without a 3-D parameter.
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
