"""efficiency: measures a model's time, memory, disk space and energy, beside a baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from tnlm.errors import OptionError
from tnlm.evaluation.energy import meter, spent
from tnlm.evaluation.footprint import disk_bytes, resident_bytes, weight_bytes, working_bytes
from tnlm.evaluation.mode import check_positions, evaluating
from tnlm.evaluation.speed import timed_decoding
from tnlm.evaluation.usage import Efficiency, Spread, Timing, Usage
from tnlm.layers.packing import count_parameters
from tnlm.targets.ends import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Key = tuple[str, int]


def efficiency(
    model: PreTrainedModel,
    *,
    tokenizer: Any = None,
    prompt_tokens: Sequence[int] = (16, 128),
    new_tokens: int = 32,
    repeats: int = 5,
    baseline: PreTrainedModel | None = None,
    directory: str | Path | None = None,
    baseline_directory: str | Path | None = None,
    progress: bool = True,
) -> Efficiency:
    """Measure time, memory, disk space and energy of greedy decoding at batch 1 with a KV cache.

    Model and baseline alternate, so that drift of the machine affects both alike. The first turn is
    not counted. Prompts are random tokens, the same for both.

    Args:
        model: a causal language model, left unchanged.
        tokenizer: included in the disk space, if given.
        prompt_tokens: prompt lengths.
        new_tokens: tokens to decode after each prompt.
        repeats: repeats of each model at each length.
        baseline: the model to compare with, e.g. the dense one.
        directory: where the model is saved; by default, it is saved to a temporary directory.
        baseline_directory: where the baseline is saved.
        progress: show a progress bar.

    Returns:
        Medians with their spread, bytes, and joules if the machine has counters.

    Raises:
        OptionError: if a count is below 1.
        EvaluationError: if there are more tokens than a model has positions.

    Source:
        Energy: RAPL's counters (Khan et al., "RAPL in action", ACM ToMPECS 2018) or NVML's.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> found = efficiency(LlamaForCausalLM(tiny), prompt_tokens=[4], new_tokens=2, repeats=1,
        ...                    progress=False)
        >>> found.model.parameters, found.model.timings[0].prompt_tokens
        (3632, 4)
    """
    lengths = list(prompt_tokens)
    _check(lengths, new_tokens, repeats)
    models = {"model": model} | ({} if baseline is None else {"baseline": baseline})
    for each in models.values():
        length = max(lengths) + new_tokens
        check_positions(
            each, length, f"prompt_tokens + new_tokens = {length}", ("prompt_tokens", "new_tokens")
        )
    places = {"model": directory, "baseline": baseline_directory}
    prompts = _prompts(models, lengths)
    with evaluating(*models.values()):
        timings = _timings(models, prompts, new_tokens, repeats, progress)
        working = {name: _working(each, prompts[-1], new_tokens) for name, each in models.items()}
    usage = {
        name: Usage(
            parameters=count_parameters(each),
            weights=weight_bytes(each),
            working=working[name],
            disk=disk_bytes(each, tokenizer, places[name]),
            timings=tuple(timings[name]),
        )
        for name, each in models.items()
    }
    return Efficiency(
        model=usage["model"],
        baseline=usage.get("baseline"),
        new_tokens=new_tokens,
        repeats=repeats,
        device=str(model.device),
        threads=torch.get_num_threads(),
        resident=resident_bytes(),
    )


def _check(lengths: Sequence[int], new_tokens: int, repeats: int) -> None:
    for name, value in {"new_tokens": new_tokens, "repeats": repeats}.items():
        if value < 1:
            raise OptionError(f"{name}={value}, but at least 1 is needed", argument=name)
    if not lengths or min(lengths) < 1 or len(set(lengths)) < len(lengths):
        raise OptionError(
            f"prompt_tokens={lengths}; allowed: different lengths of at least 1",
            argument="prompt_tokens",
        )


def _prompts(models: Mapping[str, PreTrainedModel], lengths: Sequence[int]) -> list[Tensor]:
    """Draw a prompt ``(1, length)`` of each length, shortest first."""
    vocabulary = min(vocabulary_of(m) or 1 for m in models.values())
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocabulary, (1, length), generator=generator) for length in sorted(lengths)
    ]


def _timings(
    models: Mapping[str, PreTrainedModel],
    prompts: Sequence[Tensor],
    new_tokens: int,
    repeats: int,
    progress: bool,
) -> dict[str, list[Timing]]:
    """Time every model at every length, in alternation."""
    prefills: dict[_Key, list[float]] = defaultdict(list)
    decodes: dict[_Key, list[float]] = defaultdict(list)
    joules: dict[_Key, list[float]] = defaultdict(list)
    counters = {name: meter(model.device) for name, model in models.items()}
    for turn in tqdm(range(repeats + 1), desc="turns", disable=not progress):
        for prompt in prompts:
            for name, model in models.items():
                read, key = counters[name], (name, prompt.shape[1])
                before = read() if read is not None else {}
                prefill, decode = timed_decoding(model, prompt, new_tokens)
                after = read() if read is not None else {}
                if turn == 0:  # warm-up
                    continue
                prefills[key].append(prefill)
                decodes[key].append(decode / new_tokens)
                if read is not None:
                    joules[key].append(spent(before, after))
    return {
        name: [
            Timing(
                prompt_tokens=length,
                prefill=Spread.of(prefills[name, length]),
                decode=Spread.of(decodes[name, length]),
                joules=Spread.of(found).median if (found := joules[name, length]) else None,
            )
            for length in (prompt.shape[1] for prompt in prompts)
        ]
        for name in models
    }


def _working(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> int | None:
    """Return the growth of memory while the model runs, outside the timed turns."""
    return working_bytes(lambda: timed_decoding(model, prompt, new_tokens), model.device)
