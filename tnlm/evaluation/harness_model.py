"""A model in memory for lm-evaluation-harness; imported only when benchmarks run."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from tnlm.errors import EvaluationError
from tnlm.evaluation.local_tasks import NUMBER
from tnlm.targets.ends import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_TOO_LONG = "sequence-length-is-longer-than-the-specified-maximum"
_UNSCORED = (0.0, False)
"""Stands for the likelihood of a choice that is longer than the window."""


class HarnessModel(HFLM):  # type: ignore[misc]  # lm-eval has no annotations that mypy reads
    """lm-eval's Hugging Face model, with errors that name the item that cannot be scored.

    Args:
        model: a causal language model.
        tokenizer: the model's tokenizer.
        task: name of the task, for errors.
        batch_size: sequences per pass.
        max_length: most tokens of a prompt; None for lm-eval's default.

    Attributes:
        truncated: number of prompts that lost their first tokens.
        tokens: number of tokens of each continuation, by context and continuation.
        too_long: contexts with continuations that are longer than the window, and are not scored.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        task: str,
        batch_size: int,
        max_length: int | None,
    ) -> None:
        if not any(isinstance(t, int) for t in (tokenizer.bos_token_id, tokenizer.eos_token_id)):
            raise EvaluationError("the tokenizer has no BOS and no EOS token to start a text with")
        tokenizer = copy.deepcopy(tokenizer)  # lm-eval adds a padding token
        tokenizer.deprecation_warnings[_TOO_LONG] = True  # long texts are cut and counted
        with _left_untied(model):
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_length,
                softmax_dtype=torch.promote_types(model.dtype, torch.float32),
            )
        self.truncated = 0
        self.tokens: dict[tuple[str, str], int] = {}
        self.too_long: set[tuple[str, str]] = set()
        self._of = task
        self._names: list[str] = []

    def loglikelihood(self, requests: Sequence[Any], **options: Any) -> list[tuple[float, bool]]:
        """Score continuations; raise an error that names an item without a finite likelihood."""
        self._names = [self._name(request) for request in requests]
        found: list[tuple[float, bool]] = super().loglikelihood(requests, **options)
        for name, (value, _) in zip(self._names, found, strict=True):
            if not math.isfinite(value):
                raise EvaluationError(
                    f"{name}: the log-likelihood is {value}: the model's output is not finite "
                    "there; look for NaN or infinite weights"
                )
        return found

    def generate_until(self, requests: Sequence[Any], **options: Any) -> list[str]:
        """Continue prompts; raise an error if the model cannot."""
        if not self.model.can_generate():
            raise EvaluationError(f"{type(self.model).__name__} cannot generate text")
        for request in requests:
            prompt, how = request.args
            room = self.max_length - how["max_gen_toks"]
            if room < 1:
                raise EvaluationError(
                    f"max_new_tokens={how['max_gen_toks']} leaves no room for a prompt in a window "
                    f"of {self.max_length}; use at most {self.max_length - 1}",
                    argument="max_new_tokens",
                )
            tokens = self.tok_encode(prompt)
            self._check_vocabulary(self._name(request), tokens)
            self.truncated += len(tokens) > room
        answers: list[str] = super().generate_until(requests, **options)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Any], **options: Any) -> Any:
        """Check tokenised pairs before any is scored, and score those that fit the window."""
        for name, (pair, context, continuation) in zip(self._names, requests, strict=True):
            if not context or not continuation:
                raise EvaluationError(f"{name}: {pair[1]!r} has no tokens of its own to score")
            self._check_vocabulary(name, [*context, *continuation])
            self.tokens[pair] = len(continuation)
            if len(continuation) > self.max_length:
                self.too_long.add(pair)
            else:
                self.truncated += len(context) + len(continuation) > self.max_length + 1
        fitting = [request for request in requests if request[0] not in self.too_long]
        found = iter(super()._loglikelihood_tokens(fitting, **options) if fitting else ())
        return [_UNSCORED if pair in self.too_long else next(found) for pair, *_ in requests]

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Return the logits ``(batch, tokens, vocabulary)``, without keeping a cache."""
        logits = getattr(self.model(input_ids=inps, use_cache=False), "logits", None)
        if not isinstance(logits, torch.Tensor) or logits.shape[:2] != inps.shape:
            raise EvaluationError(
                f"{type(self.model).__name__} gives no logits for every token; likelihoods need a "
                "causal language model"
            )
        return logits

    def _check_vocabulary(self, name: str, tokens: Sequence[int]) -> None:
        size = vocabulary_of(self.model)
        if size is not None and (most := max(tokens)) >= size:
            raise EvaluationError(
                f"{name}: the tokenizer gives the id {most}, but the model has {size} tokens; "
                "use the model's own tokenizer"
            )

    def _name(self, request: Any) -> str:
        return f"{self._of} item {request.doc.get(NUMBER, request.doc_id)}"


@contextmanager
def _left_untied(model: PreTrainedModel) -> Iterator[None]:
    """Keep lm-eval from tying weights that were untied after the model was loaded."""
    vars(model)["tie_weights"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(model)["tie_weights"]
