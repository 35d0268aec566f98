"""Speculative decoding: compressed models draft for the dense one, which checks; greedy, batch 1.

    tnlm compress MODEL int8 --scheme rtn --precision int8 --dtype bfloat16
    tnlm compress MODEL small --scheme svd-llm --keep-targets 0.6 --calibration train.txt
    python benchmarks/drafting.py MODEL int8 small --text test.txt --dtype bfloat16 --out OUT

Prompts are windows of the text, or random tokens without one. Dense decoding and each pair of a
draft and a number of drafted tokens take turns on every prompt; speeds are medians over prompts of
the ratio of seconds, prefill of both models included. Accepted: of the tokens that were drafted,
the share that the dense model kept. Equal: of the tokens that came out, the share that stands
before the first difference from dense decoding, which rounding makes in bfloat16.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timing import DTYPES, table, write
from torch import Tensor
from transformers import PreTrainedModel

import tnlm
from tnlm.calibration.text import tokenize
from tnlm.checkpoint.dense_models import load_model
from tnlm.evaluation import decode_rates

logger = logging.getLogger("drafting")


@dataclass
class Run:
    """What one generation took and made."""

    tokens: Tensor
    seconds: float
    drafted: int
    checks: int


def main() -> None:
    """Measure every draft, then write the table."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    asked = _arguments()
    dense, tokenizer = load_model(asked.model, dtype=DTYPES[asked.dtype])
    tnlm.arrange(dense)
    drafts = {Path(d).name: load_model(d, dtype=DTYPES[asked.dtype])[0] for d in asked.drafts}
    prompts = _prompts(asked, tokenizer, dense.config.vocab_size)
    rates = decode_rates({"dense": dense, **drafts}, new_tokens=16, repeats=5)
    runs = _turns(dense, drafts, prompts, asked)
    rows = [
        {"draft": name, "length": length, "draft_speed": rates[name] / rates["dense"]}
        | _summary(runs["dense", 0], found, asked.new_tokens)
        for (name, length), found in runs.items()
        if length
    ]
    figures = {"model": Path(asked.model).name, "dtype": asked.dtype, "prompts": len(prompts)}
    figures |= {"new_tokens": asked.new_tokens, "rows": rows}
    write(asked.out, "drafting", figures, _table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="directory of the dense model")
    parser.add_argument("drafts", nargs="+", help="directories of compressed ones")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2, 4, 8], help="drafted at once")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--prompts", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=1, help="turns on every prompt")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def _prompts(asked: argparse.Namespace, tokenizer: Any, words: int) -> Tensor:
    count = asked.prompts * asked.prompt_tokens
    if asked.text is None:
        ids = torch.randint(words, (count,), generator=torch.Generator().manual_seed(0))
    else:
        ids = tokenize(asked.text.read_text()[: 40 * count], tokenizer)[:count]
    return ids.reshape(asked.prompts, 1, asked.prompt_tokens)


def _turns(
    dense: PreTrainedModel,
    drafts: dict[str, PreTrainedModel],
    prompts: Tensor,
    asked: argparse.Namespace,
) -> dict[tuple[str, int], list[Run]]:
    """Return the runs of dense decoding, under ``("dense", 0)``, and of every pair."""
    pairs = [(name, length) for name in drafts for length in asked.lengths]
    runs: dict[tuple[str, int], list[Run]] = {pair: [] for pair in [("dense", 0), *pairs]}
    for number, prompt in enumerate([prompts[0], *prompts.repeat(asked.repeats, 1, 1)]):
        for (name, length), found in runs.items():
            run = _generate(dense, drafts.get(name), prompt, length, asked.new_tokens)
            if number > 0:  # the first is a warm-up
                found.append(run)
        logger.info("prompt %d of %d", number, len(prompts) * asked.repeats)
    return runs


def _generate(
    dense: PreTrainedModel, draft: PreTrainedModel | None, prompt: Tensor, length: int, count: int
) -> Run:
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": count, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    drafter: PreTrainedModel | None = draft
    if drafter is not None:
        said: Any = drafter.generation_config
        said.num_assistant_tokens, said.assistant_confidence_threshold = length, 0.0
        said.num_assistant_tokens_schedule = "constant"
        options["assistant_model"] = drafter
    with _calls(dense) as checks, _calls(drafter) as drafted:
        start = time.perf_counter()
        made: Any = dense.generate(prompt, **options)
        seconds = time.perf_counter() - start
    return Run(made[0, prompt.shape[1] :], seconds, len(drafted), len(checks))


@contextmanager
def _calls(model: PreTrainedModel | None) -> Iterator[list[None]]:
    """Count the forward passes of a model: one entry each."""
    found: list[None] = []
    if model is None:
        yield found
        return
    handle = model.register_forward_hook(lambda *_: found.append(None))
    try:
        yield found
    finally:
        handle.remove()


def _summary(plain: list[Run], drafted: list[Run], count: int) -> dict[str, float]:
    pairs = list(zip(plain, drafted, strict=True))
    made = count * len(drafted)
    checks, asked = (sum(getattr(run, name) for run in drafted) for name in ("checks", "drafted"))
    return {
        # Every check yields one token of the dense model's own beside those it accepts.
        "accepted": (made - checks) / asked,
        "tokens_a_check": made / checks,
        "speed": statistics.median(a.seconds / b.seconds for a, b in pairs),
        "equal": sum(_agreeing(a.tokens, b.tokens) for a, b in pairs) / made,
    }


def _agreeing(first: Tensor, second: Tensor) -> int:
    """Return how many tokens stand before the first that differs.

    Example:
        >>> _agreeing(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
        1
    """
    return int((first == second).cumprod(0).sum())


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["draft", "its own speed", "drafted at once", "accepted", "tokens a check", "speed"]
    shown = ("accepted", "tokens_a_check", "speed", "equal")
    lines = []
    for row in rows:
        figures = [f"{row[name]:.2f}" for name in shown]
        lines.append([row["draft"], f"{row['draft_speed']:.2f}", row["length"], *figures])
    return table([*head, "equal"], lines)


if __name__ == "__main__":
    main()
