"""Mixed-rank fine-tuning: layers take turns at random between their factors and a dense weight.

Source: LPAF, Ren and Zhu 2023 (arXiv 2306.14152). Its settings are not published: the defaults here
are tnlm's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from tnlm.errors import OptionError, TargetError, did_you_mean
from tnlm.layers.linear import FactorizedLinear
from tnlm.recovery.lessons import logit_loss
from tnlm.recovery.loop import Batches, backward, check_course, clip, guarded, in_turn, usable
from tnlm.recovery.schedule import linear

TRAIN = ("all", "factors")
WARM_UP = 0.1
"""Share of the steps over which the learning rate rises; it then falls along a cosine to 0."""


class MixedRank(nn.Module):
    """A factorized layer that is now and then its dense weight, while it is trained.

    Each pass in training mode draws z from Bernoulli(p), and gives (1 − z)(AB)x + zWx, with the
    layer's own bias. In eval mode, and at p = 0, it is the factorized layer and draws nothing. The
    draws are torch's own, so that checkpointed activations are computed again with the same ones.

    Args:
        factorized: any factorized linear layer.
        dense: W, ``(out, in)``; moved to the factors' dtype and device, and copied if trained.
        probability: p.
        trained: whether W requires gradients.

    Raises:
        OptionError: if W has another shape, or p is no probability.

    Example:
        >>> from tnlm.network import Network
        >>> net = Network({"left": "oa", "right": "ai"}, "o", "i", {"o": 6, "a": 2, "i": 5})
        >>> factors = {"left": torch.randn(6, 2), "right": torch.randn(2, 5)}
        >>> dense, x = torch.randn(6, 5), torch.randn(3, 5)
        >>> mixed = MixedRank(FactorizedLinear(net, bias=False).store(factors), dense, 1.0)
        >>> bool(torch.equal(mixed(x), F.linear(x, dense)))
        True
        >>> bool(torch.equal(mixed.eval()(x), mixed.factorized(x)))
        True
    """

    def __init__(
        self,
        factorized: FactorizedLinear,
        dense: Tensor,
        probability: float = 0.0,
        *,
        trained: bool = False,
    ) -> None:
        """Hold both; see the class for the arguments."""
        super().__init__()
        if dense.shape != (factorized.out_features, factorized.in_features):
            raise OptionError(
                f"a dense weight {tuple(dense.shape)} for a layer of shape "
                f"{(factorized.out_features, factorized.in_features)}"
            )
        check_probability("probability", probability)
        like = next(factorized.parameters())
        self.factorized = factorized
        self.dense = nn.Parameter(dense.detach().to(like, copy=trained), requires_grad=trained)
        self.probability = probability
        self.train(factorized.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply either map to ``(..., in)``, giving ``(..., out)``."""
        if self.training and self.probability > 0 and float(torch.rand(())) < self.probability:
            return F.linear(x, self.dense, self.factorized.bias)
        factorized: Tensor = self.factorized(x)
        return factorized


def mixed_rank_finetune(
    model: PreTrainedModel,
    dense_weights: Mapping[str, Tensor],
    batches: Batches,
    *,
    steps: int | None = None,
    learning_rate: float = 5e-5,
    start: float = 0.5,
    consistency: float = 1.0,
    train: str = "all",
    train_dense: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """Train a compressed model in place, with layers that are their dense weights now and then.

    Every layer is a `MixedRank` while it is trained, with a probability p that falls along a line
    to 0 at the last step. Each batch takes two passes with draws of their own. The loss is the mean
    of the model's own two losses, plus ``consistency`` times KL(first || second) of the predictions
    (as both passes are drawn alike, the other direction is the same in expectation). In the end the
    dense weights are gone, and the model is exactly the factorized one.

    If anything fails its weights are what they were.

    Args:
        model: compressed; trained in train mode, so that dropout too tells the passes apart.
        dense_weights: ``(out, in)`` by the name of a factorized linear layer.
        batches: ``input_ids``, ``attention_mask`` and ``labels``; drawn at random, and again where
            they are short.
        steps: one batch each; None for two passes over the batches.
        learning_rate: of AdamW, at its highest.
        start: p at the first step.
        consistency: weight of the divergence between the passes; at 0 there is one pass.
        train: ``"all"``, the factors and all other parameters that require gradients, or the
            ``"factors"`` alone.
        train_dense: whether the dense weights are trained, too.
        seed: of all that is drawn.
        progress: show a progress bar.

    Returns:
        The model.

    Raises:
        OptionError: for an option out of range, or a weight of another shape.
        TargetError: if there is no weight, or a name is of no factorized linear layer.
        CalibrationError: if there are no batches, labels or predictions.
        TrainingError: if a loss, gradient or weight is not finite.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> name = "model.layers.0.mlp.up_proj"
        >>> dense = {name: model.get_submodule(name).weight.detach().clone()}
        >>> model = tnlm.compress(model, "svd", keep_targets=0.5)
        >>> ids = torch.arange(16).reshape(2, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> model = mixed_rank_finetune(model, dense, [batch], steps=4, progress=False)
        >>> type(model.get_submodule(name)).__name__
        'FactorizedLinear'
    """
    check_course(steps, 1, learning_rate)
    check_probability("start", start)
    if not 0 <= consistency < math.inf:
        raise OptionError(f"consistency={consistency!r}; allowed: a finite weight of at least 0")
    if train not in TRAIN:
        raise OptionError(f"train={train!r}{did_you_mean(str(train), TRAIN)}")
    found = usable(model, batches)
    steps = 2 * len(batches) if steps is None else steps
    factors = {id(p) for p in _factors(model, dense_weights)}
    trained = [
        p for p in model.parameters() if id(p) in factors or (train == "all" and p.requires_grad)
    ]
    with (
        guarded(model, trained, seed),
        mixed(model, dense_weights, train_dense) as layers,
    ):
        learned = [*trained, *(layer.dense for layer in layers if train_dense)]
        adam = torch.optim.AdamW(learned, lr=learning_rate, weight_decay=0.0)
        rates = get_cosine_schedule_with_warmup(adam, max(1, round(WARM_UP * steps)), steps + 1)
        rounds = enumerate(in_turn(model, found, steps))
        for step, batch in tqdm(
            rounds, total=steps, desc="fine-tuning", unit="step", disable=not progress
        ):
            for layer in layers:
                layer.probability = linear(step, steps - 1, start=start)
            adam.zero_grad()
            backward(_loss(model, batch, consistency), step, steps)
            clip(learned, step, steps)
            adam.step()
            rates.step()
    return model


@contextmanager
def mixed(
    model: PreTrainedModel, dense_weights: Mapping[str, Tensor], trained: bool = False
) -> Iterator[list[MixedRank]]:
    """Wrap layers as `MixedRank` while a block of code runs, at p = 0, and unwrap them after.

    Args:
        model: changed in place.
        dense_weights: ``(out, in)`` by the name of a factorized linear layer.
        trained: whether the dense weights require gradients.

    Raises:
        TargetError: if there is no weight, or a name is of no factorized linear layer.
        OptionError: if a weight has another shape.
    """
    layers = _layers(model, dense_weights)
    wrapped = {
        name: MixedRank(layer, dense_weights[name], trained=trained)
        for name, layer in layers.items()
    }
    try:
        for name, wrapper in wrapped.items():
            model.set_submodule(name, wrapper)
        yield list(wrapped.values())
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def consistency_loss(first: Tensor, second: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return KL(first || second) of two passes' predictions, averaged over positions.

    Gradients flow into both.

    Args:
        first: logits ``(..., choices)``.
        second: logits of the same shape.
        mask: ``(...)``, 0 where a position is padding; None to count all.

    Example:
        >>> x = torch.tensor([[0.0, 1.0]])
        >>> float(consistency_loss(x, x)), round(float(consistency_loss(x, -x)), 3)
        (0.0, 0.462)
    """
    return logit_loss(second, first, mask, temperature=1.0)


def check_probability(name: str, value: float) -> None:
    """Raise `OptionError` unless a value is a probability."""
    if not 0 <= value <= 1:
        raise OptionError(f"{name}={value!r}; allowed: a probability, from 0 to 1")


def _loss(model: PreTrainedModel, batch: Mapping[str, Tensor], consistency: float) -> Tensor:
    outputs: list[Any] = [model(**batch) for _ in range(2 if consistency else 1)]
    loss: Tensor = torch.stack([output.loss for output in outputs]).mean()
    if not consistency:
        return loss
    first, second = (output.logits for output in outputs)
    mask = batch.get("attention_mask") if first.dim() == 3 else None
    return loss + consistency * consistency_loss(first, second, mask)


def _layers(
    model: PreTrainedModel, dense_weights: Mapping[str, Tensor]
) -> dict[str, FactorizedLinear]:
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in dense_weights:
        layer = modules.get(name)
        if not isinstance(layer, FactorizedLinear):
            kind = "no module" if layer is None else f"a {type(layer).__name__}"
            raise TargetError(f"{kind} at {name!r}; name factorized linear layers")
        found[name] = layer
    if not found:
        raise TargetError("there is no factorized linear layer to train with its dense weight")
    return found


def _factors(model: PreTrainedModel, dense_weights: Mapping[str, Tensor]) -> Iterator[nn.Parameter]:
    for layer in _layers(model, dense_weights).values():
        for child in layer.children():
            yield from child.parameters()
