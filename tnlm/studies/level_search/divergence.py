"""The divergence of a changed model's predictions from the dense model's, on held-out windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.errors import EvaluationError
from tnlm.evaluation.mode import evaluating
from tnlm.evaluation.number import finite
from tnlm.recovery.lessons import logit_loss
from tnlm.utils.spill import Slot, Spill


class Divergence:
    """KL(dense || model) in nats, a mean over tokens; the dense predictions are kept on disk.

    Args:
        model: the dense model.
        windows: token ids ``(length,)`` each.
        place: distinguishes these windows from other parts of the text.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny)
        >>> Divergence(model, [torch.arange(8)])(model, tokens=8)
        0.0
    """

    def __init__(self, model: PreTrainedModel, windows: Sequence[Tensor], place: str = "") -> None:
        """Run nothing yet; see the class for the arguments."""
        self._dense, self._windows, self.place = model, windows, place
        self._spill = Spill()
        self._kept: list[Slot] = []
        self.tokens = 0

    def __call__(self, model: PreTrainedModel, tokens: int) -> float:
        """Return the divergence on the first windows that hold so many tokens, or on all.

        Raises:
            EvaluationError: if it is not finite.
        """
        total, count = 0.0, 0
        for number, ids in enumerate(self._windows):
            if count >= tokens:
                break
            found = logit_loss(_logits(model, ids), self._teacher(number, ids), temperature=1.0)
            total, count = total + float(found) * len(ids), count + len(ids)
        self.tokens += count
        return finite(total / count, "the divergence from the dense model")

    def _teacher(self, number: int, ids: Tensor) -> Tensor:
        """Return the dense model's logits of a window, computed once."""
        while len(self._kept) <= number:
            logits = _logits(self._dense, self._windows[len(self._kept)])
            if not bool(logits.isfinite().all()):
                raise EvaluationError("the dense model's predictions are not finite on the text")
            self._kept.append(self._spill.put(logits))
        return self._spill.take(self._kept[number])


def _logits(model: Any, ids: Tensor) -> Tensor:
    with evaluating(model):
        logits: Tensor = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
    return logits.float()
