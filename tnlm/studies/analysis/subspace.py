"""A model whose parameters only move in a random subspace: θ = θ₀ + P θ_d."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tnlm.errors import ModelError, OptionError, TrainingError, did_you_mean
from tnlm.studies.analysis.fastfood import Fastfood
from tnlm.studies.analysis.projections import Dense, Projection
from tnlm.utils.checks import check_whole
from tnlm.utils.names import split_at_block

KINDS = ("did", "said")
"""Without scales; or with a trained scale for each layer."""

PROJECTIONS: Mapping[str, type[Projection]] = {"dense": Dense, "fastfood": Fastfood}


class Space(nn.Module):
    """Trainable parameters that determine those of a model, which itself is left unchanged.

    They move the model's floating-point parameters that require a gradient; tied ones count once.

    Args:
        model: any module; its current parameters are θ₀.

    Raises:
        ModelError: if no parameter of the model requires a gradient.
    """

    def __init__(self, model: nn.Module) -> None:
        """Collect the parameters; see the class for the arguments."""
        super().__init__()
        self._held = [model]  # in a list, so that it is no submodule
        self.start = {
            name: parameter.detach()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and parameter.is_floating_point()
        }
        if not self.start:
            raise ModelError(
                f"no parameter of {type(model).__name__} requires a gradient, so that none can "
                "be trained; call model.requires_grad_()"
            )
        self.total = sum(tensor.numel() for tensor in self.start.values())

    @property
    def model(self) -> nn.Module:
        """The model, with its own parameters."""
        return self._held[0]

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Return the model's parameters at this point, by name."""

    @abstractmethod
    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return parameter groups, with learning rates that move the model alike in any space."""

    def forward(self, *args: Any, **arguments: Any) -> Any:
        """Run the model with its parameters at this point; its buffers are left unchanged."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return functional_call(self.model, (self.weights(), buffers), args, arguments)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """Give the model its parameters at this point for a block; restore its own after."""
        parameters = dict(self.model.named_parameters())
        before = {name: parameters[name].data for name in self.start}
        with torch.no_grad():
            found = self.weights()
        try:
            for name, tensor in found.items():
                parameters[name].data = tensor
            yield self.model
        finally:
            for name, tensor in before.items():
                parameters[name].data = tensor

    def write(self) -> nn.Module:
        """Write the parameters at this point into the model, and return it.

        Raises:
            TrainingError: if one is not finite; the model is left unchanged.
        """
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            found = self.weights()
            for name, tensor in found.items():
                if not bool(tensor.isfinite().all()):
                    raise TrainingError(f"{name} is not finite; the model is left unchanged")
            for name, tensor in found.items():
                parameters[name].copy_(tensor)
        return self.model


class FullSpace(Space):
    """All parameters of a model: what a subspace is compared with."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the parameters."""
        super().__init__(model)
        self.points = nn.ParameterList(tensor.clone() for tensor in self.start.values())

    def weights(self) -> dict[str, Tensor]:
        """Return the model's parameters at this point, by name."""
        return dict(zip(self.start, self.points, strict=True))

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return all parameters."""
        return [{"params": list(self.points), "lr": learning_rate}]


class Subspace(Space):
    """The parameters of a model in a random subspace of few dimensions, θ = θ₀ + P θ_d.

    θ_d starts at zero, where the model is unchanged. P is fixed, drawn from the seed tensor by
    tensor, and never stored as a matrix; its columns have length 1, or nearly, over the whole
    model. With ``kind="said"`` every layer i has a scale λ_i, which starts at 1:
    θ_i = θ₀_i + λ_i (P θ_(d-m))_i. The m scales are part of d. A layer is a numbered block, or a
    module outside the blocks that has parameters of its own.

    Args:
        model: any module, left unchanged until :meth:`write`.
        d: how many parameters are trained, including scales.
        seed: draws P.
        kind: ``"did"`` or ``"said"``.
        projection: ``"fastfood"`` or ``"dense"``.

    Raises:
        OptionError: if the kind or projection is unknown, or d is not possible.
        ModelError: if no parameter of the model requires a gradient.

    Source: Li et al. 2018, arXiv 1804.08838; for SAID Aghajanyan et al. 2021, arXiv 2012.13255.
        There, columns have length 1 within each tensor; here, over the whole model.

    Example:
        >>> space = Subspace(nn.Linear(4, 3), d=2)
        >>> [tuple(p.shape) for p in space.parameters()], space.total
        ([(2,)], 15)
    """

    def __init__(
        self,
        model: nn.Module,
        d: int,
        *,
        seed: int = 0,
        kind: str = "did",
        projection: str = "fastfood",
    ) -> None:
        """Draw a seed for every tensor; see the class for the arguments."""
        super().__init__(model)
        check_kind(kind, projection)
        layers = layers_of(self.start) if kind == "said" else []
        check_whole("d", d, len(layers) + 1, self.total)
        like = next(iter(self.start.values()))
        wide = any(tensor.dtype == torch.float64 for tensor in self.start.values())
        made: dict[str, Any] = {
            "device": like.device,
            "dtype": torch.float64 if wide else torch.float32,
        }
        self.theta = nn.Parameter(torch.zeros(d - len(layers), **made))
        self.scales = nn.Parameter(torch.ones(len(layers), **made)) if layers else None
        self._layers = {layer: index for index, layer in enumerate(layers)}
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(2**62, (len(self.start),), generator=generator).tolist()
        self._projections = {
            name: PROJECTIONS[projection](tensor.numel(), len(self.theta), drawn)
            for (name, tensor), drawn in zip(self.start.items(), seeds, strict=True)
        }

    @property
    def d(self) -> int:
        """How many parameters are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def weights(self) -> dict[str, Tensor]:
        """Return θ₀ + P θ_d, by the names in the model."""
        return {name: self._weight(name, tensor) for name, tensor in self.start.items()}

    def _weight(self, name: str, start: Tensor) -> Tensor:
        share = (start.numel() / self.total) ** 0.5
        moved = share * self._projections[name](self.theta).reshape(start.shape)
        if self.scales is not None:
            moved = self.scales[self._layers[layer_of(name)]] * moved
        result: Tensor = (start.to(moved) + moved).to(start)
        return result

    def write(self) -> nn.Module:
        """Write the parameters at this point into the model, and return it.

        The subspace is then centered at this point, with θ_d at zero.

        Raises:
            TrainingError: if one is not finite; the model is left unchanged.
        """
        model = super().write()
        with torch.no_grad():
            self.theta.zero_()
            if self.scales is not None:
                self.scales.fill_(1.0)
        return model

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """Return θ_d with a rate at which Adam's first step is as long as in the full training.

        In that step every parameter moves by the rate, and the columns of P have length 1.
        """
        rate = learning_rate * (self.total / len(self.theta)) ** 0.5
        found: list[dict[str, Any]] = [{"params": [self.theta], "lr": rate}]
        if self.scales is not None:
            found.append({"params": [self.scales], "lr": learning_rate})
        return found


def check_kind(kind: str, projection: str) -> None:
    """Raise `OptionError` for an unknown kind of subspace or projection.

    Example:
        >>> check_kind("did", "fastfood")
    """
    if kind not in KINDS:
        raise OptionError(f"kind={kind!r}{did_you_mean(str(kind), KINDS)}")
    if projection not in PROJECTIONS:
        raise OptionError(f"projection={projection!r}{did_you_mean(str(projection), PROJECTIONS)}")


def layer_of(parameter: str) -> str:
    """Return the layer of a parameter: its numbered block, or else its module.

    Example:
        >>> layer_of("model.layers.11.mlp.up_proj.weight"), layer_of("lm_head.weight")
        ('model.layers.11', 'lm_head')
    """
    split = split_at_block(parameter)
    if split is None:
        return parameter.rpartition(".")[0]
    before, number, _ = split
    return f"{before}.{number}" if before else str(number)


def layers_of(parameters: Mapping[str, Any]) -> list[str]:
    """Return the layers of named parameters, in order.

    Example:
        >>> layers_of({"embed.weight": 0, "h.0.w": 0, "h.0.b": 0, "h.1.w": 0})
        ['embed', 'h.0', 'h.1']
    """
    return list(dict.fromkeys(layer_of(name) for name in parameters))
