"""A model under one configuration after another, each undone before the next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from tnlm.errors import TargetError
from tnlm.layers.linear import FactorizedLinear
from tnlm.metrics.metric import Metric
from tnlm.studies.design.configuration import Configuration
from tnlm.studies.design.forms import network_of, shrinks
from tnlm.studies.design.space import DesignSpace
from tnlm.studies.mounted import mounting
from tnlm.studies.nested_ranks import NestedRanks
from tnlm.targets.base import Target
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.selection import select
from tnlm.tensors.contraction import chain
from tnlm.tensors.gauge import fix
from tnlm.tensors.network import Factors
from tnlm.tensors.precision import as_stored
from tnlm.utils.training_flags import modes_kept


class Variants:
    """The variants of a model that the configurations of a design space describe.

    Each matrix is decomposed once, at the largest rank of the space; smaller ranks are slices of
    that. These factors stay in memory, in float64. The model's own modules are left untouched.

    Args:
        model: the model that the space was made from, or one of the same shapes.
        space: its design space.

    Raises:
        ModelError: if the model cannot be compressed.
        TargetError: if the model lacks a matrix of the space, or has it in another shape.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> space = DesignSpace(model)
        >>> with Variants(model, space).applied(space.all_tensors([0])):
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
        self._all = select(model, [target.module for target in wanted]).targets
        found = {target.name: target for target in self._all}
        for target in wanted:
            own = found.get(target.name)
            if own is None or own.shape != target.shape:
                has = own.shape if own else "no such matrix"
                raise TargetError(
                    f"the space has {target.name} of {target.shape}; the model has {has}"
                )
        check_weights(model, wanted)
        self._fits: dict[str, NestedRanks] = {}

    @contextmanager
    def applied(self, configuration: Configuration) -> Iterator[PreTrainedModel]:
        """Apply a configuration to the model for a block, and undo it even if the block fails.

        Training flags are restored as well.
        """
        chosen = self._space.targets(configuration)
        modules = {target.module for target in chosen}
        concerned = [target for target in self._all if target.module in modules]
        with modes_kept(self._model), mounting(self._model, concerned) as mounted:
            mounted.put({t.name: self._factorized(t, configuration) for t in chosen})
            yield self._model

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
        with torch.no_grad():
            stored = fix(network, self._factors(target, rank))
            return module.store(as_stored(network, stored, weight.dtype, target.name), bias)

    def _factors(self, target: Target, rank: int) -> Factors:
        """Return the factors of a matrix at a rank; fit it unless that was done."""
        found = self._fits.get(target.name)
        if found is None or found.largest < rank:
            useful = [r for r in self._space.ranks if shrinks("low-rank", target, r)]
            weight = target.weight(self._model)
            found = NestedRanks(weight, Metric(), max([rank, *useful]))
            self._fits[target.name] = found
        return found.factors(rank)
