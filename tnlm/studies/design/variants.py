"""A model under one configuration after another, each undone before the next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.metrics import Metric
from tnlm.calibration.store import model_hash
from tnlm.checks import check_model, check_weights
from tnlm.decompositions import get_format
from tnlm.decompositions.gauge import fix
from tnlm.decompositions.low_rank import LowRankSpec
from tnlm.errors import TargetError
from tnlm.fitting import by_module
from tnlm.layers.arranged import filled
from tnlm.layers.contraction import chain
from tnlm.layers.linear import FactorizedLinear
from tnlm.modes import modes_kept
from tnlm.network import Factors
from tnlm.studies.design.configuration import Configuration
from tnlm.studies.design.forms import network_of, shrinks
from tnlm.studies.design.space import DesignSpace
from tnlm.surgery import assemble
from tnlm.targets import Target, select


class Trials:
    """Puts configurations on a model for a while.

    Each matrix is decomposed once, at the largest rank of the space; a smaller rank is a part of
    that, as the best approximation of a plain matrix is (Eckart-Young). These factors stay in
    memory, in float64. The model keeps its own modules, which come back untouched.

    Args:
        model: the model that the space was made of, or one of the same shapes.
        space: its design space.

    Raises:
        ModelError: for a model that cannot be compressed.
        TargetError: if the model lacks a matrix of the space, or has it in another shape.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> space = DesignSpace(model)
        >>> with Trials(model, space).applied(space.all_tensors([0])):
        ...     type(model.model.layers[0].mlp.up_proj).__name__
        'FactorizedLinear'
        >>> type(model.model.layers[0].mlp.up_proj).__name__
        'Linear'
    """

    def __init__(self, model: PreTrainedModel, space: DesignSpace) -> None:
        """Check the model; nothing is decomposed yet."""
        check_model(model)
        self._model, self._space = model, space
        wanted = space.matrices()
        found = {t.name: t for t in select(model, [t.module for t in wanted]).targets}
        for target in wanted:
            own = found.get(target.name)
            if own is None or own.shape != target.shape:
                has = own.shape if own else "no such matrix"
                raise TargetError(
                    f"the space has {target.name} of {target.shape}; the model has {has}"
                )
        check_weights(model, wanted)
        self._all = list(found.values())
        self._fits: dict[str, Factors] = {}

    @contextmanager
    def applied(self, configuration: Configuration) -> Iterator[PreTrainedModel]:
        """Give the model the layers of a configuration, and its own back after, come what may.

        Training flags are restored as well.
        """
        chosen = self._space.targets(configuration)
        replaced: list[tuple[str, nn.Module]] = []
        with modes_kept(self._model):
            try:
                for group in by_module(chosen):
                    name = group[0].module
                    module = self._module(group, configuration)
                    replaced.append((name, self._model.get_submodule(name)))
                    self._model.set_submodule(name, module)
                yield self._model
            finally:
                for name, old in replaced:
                    self._model.set_submodule(name, old)

    def fingerprint(self) -> str:
        """Return a text that tells this model from another, by its config and weights."""
        return model_hash(self._model)

    def _module(self, group: Sequence[Target], configuration: Configuration) -> nn.Module:
        """Return what replaces a module; parts of a fused one that are not chosen stay dense."""
        first, chosen = group[0], {target.name for target in group}
        old = self._model.get_submodule(first.module)
        whole = [t for t in self._all if t.module == first.module] if first.parts else group
        modules = {
            target.name: self._factorized(target, configuration)
            if target.name in chosen
            else filled(target.weight(self._model), target.bias(self._model))
            for target in whole
        }
        module = assemble(whole, modules)
        trainable = any(p.requires_grad for p in old.parameters())
        return module.requires_grad_(trainable).train(old.training)

    def _factorized(self, target: Target, configuration: Configuration) -> nn.Module:
        rank = configuration.rank
        weight, bias = target.weight(self._model), target.bias(self._model)
        network = network_of(configuration.format, target.shape, rank)
        module = FactorizedLinear(
            network,
            bias=bias is not None,
            order=chain(network).order,
            device=weight.device,
            dtype=weight.dtype,
        )
        full = self._fit(target, rank)
        cut = {"left": full["left"][:, :rank], "right": full["right"][:rank]}
        with torch.no_grad():
            stored = fix(network, cut)
            return module.store({k: _cast(v, weight.dtype) for k, v in stored.items()}, bias)

    def _fit(self, target: Target, rank: int) -> Factors:
        """Return the factors of a matrix at a rank, or at a larger one."""
        found = self._fits.get(target.name)
        if found is None or len(found["right"]) < rank:
            useful = [r for r in self._space.ranks if shrinks("low-rank", target, r)]
            spec = LowRankSpec(max([rank, *useful]), gauge=False)
            with torch.no_grad():
                weight = target.weight(self._model)
                found = get_format("low-rank").fit(weight, Metric(), spec)
            self._fits[target.name] = found
        return found


def _cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a factor in the model's dtype; the order of a gauge is whole numbers, and stays."""
    return factor.to(dtype) if factor.is_floating_point() else factor
