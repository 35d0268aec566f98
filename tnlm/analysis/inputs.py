"""Moments of the inputs of matrices, with the number of inputs that each had."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.statistics import collect, counted_rows
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import stream
from tnlm.targets import Target

EMBEDDING = "features: an embedding has no input to measure"
UNKNOWN = "features: how many inputs it has differs from batch to batch"


@dataclass(frozen=True)
class Inputs:
    """What the inputs of a model's matrices are on data.

    Attributes:
        counts: inputs of each module on all the data, where that is known.
        statistics: means over inputs.
    """

    counts: Mapping[str, int]
    statistics: Statistics

    @classmethod
    def gather(
        cls,
        model: PreTrainedModel,
        targets: Sequence[Target],
        batches: Sequence[Batch],
        progress: bool,
    ) -> Inputs:
        """Run data through a model, left as it was; only linear targets have inputs."""
        modules = list(dict.fromkeys(t.module for t in targets if t.kind == "linear"))
        if not modules:
            return cls({}, Statistics(tokens=count_tokens(batches)))
        counts = count_inputs(model, modules, batches)
        return cls(counts, collect(model, modules, batches, progress=progress))

    def why_not(self, target: Target) -> str | None:
        """Return why a target's features are not known, or None if they are."""
        if target.kind != "linear":
            return EMBEDDING
        return None if target.module in self.counts else UNKNOWN

    def moments(self, target: Target) -> tuple[Tensor, Tensor, int]:
        """Return E[x x.T] ``(in, in)``, E[x] ``(in,)`` and the number of inputs x."""
        moment, mean = (self.statistics.tensor(target.module, n) for n in ("moment", "mean"))
        return moment, mean, self.counts[target.module]


def count_inputs(
    model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]
) -> dict[str, int]:
    """Return how many inputs each module has on all batches, as the first one tells.

    Most have one for every token. A pooler has one for a sequence, and a module that all blocks
    share several for a token. A module whose inputs depend on the data otherwise is left out.

    Args:
        model: left as it was.
        modules: dotted names.
        batches: padding is not counted.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> batch = {"input_ids": torch.ones(1, 8, dtype=torch.int64),
        ...          "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
        >>> count_inputs(model, ["transformer.h.0.mlp.c_fc"], [batch, batch])
        {'transformer.h.0.mlp.c_fc': 16}
    """
    seen = dict.fromkeys(modules, 0)

    def see(name: str, x: Tensor, mask: Tensor | None) -> None:
        seen[name] += len(counted_rows(name, x, mask))

    for _ in stream(model, modules, batches[:1], see):
        pass
    return dict(_totals(seen, batches))


def _totals(seen: Mapping[str, int], batches: Sequence[Batch]) -> Iterator[tuple[str, int]]:
    tokens, sequences = count_tokens(batches[:1]), len(batches[0]["input_ids"])
    for name, rows in seen.items():
        if rows and rows % tokens == 0:
            yield name, rows // tokens * count_tokens(batches)
        elif rows == sequences:
            yield name, sum(len(batch["input_ids"]) for batch in batches)
