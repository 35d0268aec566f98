"""Mixed-rank fine-tuning: layers randomly alternate between their factors and a dense weight.

Source: LPAF, Ren and Zhu 2023 (arXiv 2306.14152). Its settings are not published; the defaults here
are tnlm's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import OptionError, TargetError
from tnlm.layers.linear import FactorizedLinear
from tnlm.recovery.guard import GuardedTrainer
from tnlm.recovery.lessons import logit_loss
from tnlm.recovery.training import finetune
from tnlm.utils.undo import leaves_model


@leaves_model
def mixed_rank(
    model: PreTrainedModel,
    dense: Mapping[str, Tensor],
    data: Any,
    *,
    start: float = 0.5,
    consistency: float = 1.0,
    train_dense: bool = True,
    **options: Any,
) -> PreTrainedModel:
    """Train the factors of a model in place, with layers that are randomly dense.

    In training, every layer is a `MixedRank` with a probability p that falls linearly from
    ``start`` to 0 at the end. Each batch takes two passes with independent draws. The loss is the
    mean of the two passes' losses, plus ``consistency`` times KL(first || second) of the
    predictions (both passes have the same distribution, so the other direction is the same in
    expectation). As in the paper, the dense weights are trained with the factors, except zero
    entries, which were pruned. They are discarded at the end.

    Args:
        model: a compressed model.
        dense: weights ``(out, in)`` by name of a factorized linear layer; left unchanged.
        data: see :func:`tnlm.recovery.training.finetune`.
        start: p at the first step.
        consistency: weight of the divergence between the passes; with 0, there is one pass.
        train_dense: whether to train copies of the dense weights too, or only the factors.
        **options: arguments of ``finetune``, except ``train`` and ``output_dir``.

    Returns:
        The model.

    Raises:
        OptionError: if an option is out of range, or a weight has the wrong shape.
        TargetError: if there is no weight, or a name is not that of a factorized linear layer.
        TrainingError: as in ``finetune``.

    Example:
        >>> import tnlm
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
        >>> name = "transformer.h.0.mlp.c_fc"
        >>> dense = {name: model.get_submodule(name).weight.detach().T.clone()}
        >>> model = tnlm.compress(model, "svd", targets=["c_fc"], keep_targets=0.5)
        >>> model = mixed_rank(model, dense, torch.arange(64) % 9, max_length=16, progress=False)
        >>> type(model.get_submodule(name)).__name__
        'FactorizedLinear'
    """
    _check_probability("start", start)
    if not 0 <= consistency < float("inf"):
        raise OptionError(f"consistency={consistency!r}; allowed: a finite weight of at least 0")
    if "output_dir" in options:
        raise OptionError(
            "output_dir= has no effect: this training cannot be resumed; leave it out",
            argument="output_dir",
        )
    with mixed(model, dense) as layers:
        make = partial(
            MixedRankTrainer,
            layers=layers,
            start=start,
            consistency=consistency,
            train_dense=train_dense,
        )
        return finetune(model, data, train="factors", trainer=make, **options)


class MixedRank(nn.Module):
    """A factorized layer that randomly uses its dense weight in training.

    Each pass in training mode draws z from Bernoulli(p) and returns (1 − z)(AB)x + zWx, plus the
    layer's bias. In eval mode, or with p = 0, it is the factorized layer and draws nothing. Draws
    use torch's generator, so that checkpointed activations are recomputed with the same draws.

    Args:
        factorized: any factorized linear layer.
        dense: W, ``(out, in)``; the layer holds a copy, which by default requires no gradient.
        probability: p.

    Raises:
        OptionError: if W has the wrong shape, or p is not a probability.

    Example:
        >>> from tnlm.tensors.network import Network
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> factors = {"left": torch.randn(6, 2), "right": torch.randn(2, 5)}
        >>> dense, x = torch.randn(6, 5), torch.randn(3, 5)
        >>> mixed = MixedRank(FactorizedLinear(net, bias=False).store(factors), dense, 1.0)
        >>> bool(torch.equal(mixed(x), F.linear(x, dense)))
        True
        >>> bool(torch.equal(mixed.eval()(x), mixed.factorized(x)))
        True
    """

    dense: nn.Parameter

    def __init__(
        self, factorized: FactorizedLinear, dense: Tensor, probability: float = 0.0
    ) -> None:
        """Store both; see the class for the arguments."""
        super().__init__()
        shape = (factorized.out_features, factorized.in_features)
        if dense.shape != shape:
            raise OptionError(f"a dense weight {tuple(dense.shape)} for a layer of shape {shape}")
        _check_probability("probability", probability)
        self.factorized = factorized
        like = next(factorized.parameters())
        self.dense = nn.Parameter(dense.detach().to(like, copy=True), requires_grad=False)
        self.probability = probability
        self.train(factorized.training)

    @property
    def weight(self) -> Tensor:
        """The factorized weight ``(out, in)``, for models that read weights directly."""
        return self.factorized.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The factorized layer's bias."""
        return self.factorized.bias

    def train_dense(self, wanted: bool = True) -> None:
        """Set whether W is trained too; its zero entries, which were pruned, stay zero."""
        self.dense.requires_grad_(wanted)
        if wanted:
            kept = self.dense != 0
            self.dense.register_hook(lambda gradient: gradient * kept)

    def forward(self, x: Tensor) -> Tensor:
        """Apply either map to ``(..., in)``, giving ``(..., out)``."""
        if self.training and self.probability > 0 and float(torch.rand(())) < self.probability:
            return F.linear(x, self.dense, self.factorized.bias)
        factorized: Tensor = self.factorized(x)
        return factorized


@contextmanager
def mixed(model: PreTrainedModel, dense: Mapping[str, Tensor]) -> Iterator[list[MixedRank]]:
    """Wrap layers as `MixedRank`, with p = 0, while a block of code runs, and unwrap them after.

    Args:
        model: changed in place.
        dense: weights ``(out, in)`` by name of a factorized linear layer.

    Raises:
        TargetError: if there is no weight, or a name is not that of a factorized linear layer.
        OptionError: if a weight has the wrong shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = {name: modules.get(name) for name in dense}
    if not layers:
        raise TargetError("there is no factorized linear layer to train with its dense weight")
    wrapped = {}
    for name, layer in layers.items():
        if not isinstance(layer, FactorizedLinear):
            kind = "no module" if layer is None else f"a {type(layer).__name__}"
            raise TargetError(f"{kind} at {name!r}; name factorized linear layers")
        wrapped[name] = MixedRank(layer, dense[name])
    try:
        for name, wrapper in wrapped.items():
            model.set_submodule(name, wrapper)
        yield list(wrapped.values())
    finally:
        now = dict(model.named_modules(remove_duplicate=False))
        for name, wrapper in wrapped.items():
            if now.get(name) is wrapper:
                model.set_submodule(name, wrapper.factorized)


class MixedRankTrainer(GuardedTrainer):
    """Trains a model with two passes per batch, with independent draws.

    Args:
        layers: the model's mixed-rank layers.
        start: their probability at the first step.
        consistency: weight of the divergence between the passes.
        train_dense: whether to train the layers' dense weights too.
        **arguments: passed to ``transformers.Trainer``.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        *,
        layers: Sequence[MixedRank],
        start: float,
        consistency: float,
        train_dense: bool = False,
        **arguments: Any,
    ) -> None:
        """Store the settings; see the class for the arguments."""
        for layer in layers:
            layer.train_dense(train_dense)
        super().__init__(**arguments)
        self._layers, self._start, self._consistency = layers, start, consistency

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the mean loss of the passes on a batch, plus the divergence between them."""
        for layer in self._layers:
            layer.probability = self._start * (1 - self.state.global_step / self.state.max_steps)
        outputs: list[Any] = [model(**inputs) for _ in range(2 if self._consistency else 1)]
        loss: Tensor = torch.stack([output.loss for output in outputs]).mean()
        if self._consistency:
            first, second = (output.logits for output in outputs)
            mask = inputs.get("attention_mask") if first.dim() == 3 else None
            loss = loss + self._consistency * logit_loss(second, first, mask, temperature=1.0)
        if not loss.requires_grad:  # every layer used its dense weight: nothing to train
            loss.requires_grad_()
        return (loss, outputs[0]) if return_outputs else loss


def _check_probability(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r}; allowed: a probability, from 0 to 1")
