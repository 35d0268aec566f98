"""Time to the first token and between tokens, at several batches and prompts, beside dense.

    python benchmarks/serving.py dense=DIR NAME=DIR ... [--batches 1 8 32] [--prompts 32 512]
        [--new-tokens 24] [--compiled] [--dtypes float32 bfloat16] [--out DIR]
    python benchmarks/serving.py --width 2048 --layers 4 --keep-targets 0.8 0.6 ...

Models are read from directories, the first of which is what the others are compared with, or are
random Llamas of a width, dense and of low rank, with a vocabulary of 512. They take turns in one
process. ``generate`` writes greedily, and a streamer notes when each token comes: times are medians
over all turns, those between tokens over all tokens too. With ``--compiled`` every model decodes
as `tnlm.compile_decoding` lets it. Memory is that of the weights and of keys and values. On a
machine with other work, ``--cpu-time`` counts the processor's seconds in place of the clock's, with
one thread.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import model as whole_models
import torch
from timing import DTYPES, add_options, table, weight_bytes, with_earlier, write
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import tnlm
from tnlm.checkpoint.dense_models import load_model

QUICK = {
    "width": 128,
    "layers": 1,
    "keep_targets": [0.6],
    "dtypes": ["float32"],
    "batches": [2],
    "prompts": [8],
    "new_tokens": 3,
    "repeats": 1,
}
Row = dict[str, Any]
Models = dict[str, PreTrainedModel]


class Arrivals(BaseStreamer):
    """Notes when the prompt and each token come."""

    def __init__(self, now: Callable[[], float]) -> None:
        """Start with the time of now."""
        self.now = now
        self.times = [now()]

    def put(self, value: Tensor) -> None:
        """Note the time."""
        self.times.append(self.now())

    def end(self) -> None:
        """Do nothing more."""


def main() -> None:
    """Measure all cases, then write the table."""
    asked = _arguments()
    name, models = _models(asked)
    rows: list[Row] = []
    for dtype in asked.dtypes:
        for each in models.values():
            each.to(DTYPES[dtype]).eval()
        if asked.compiled:
            torch._dynamo.reset()
            models = {of: tnlm.compile_decoding(each) for of, each in models.items()}
        case = {
            "model": name,
            "dtype": dtype,
            "decoding": "compiled" if asked.compiled else "eager",
        }
        for batch in asked.batches:
            for prompt in asked.prompts:
                rows += [case | row for row in _measured(models, batch, prompt, asked)]
    rows = with_earlier(asked.out, "serving", "rows", rows)
    write(asked.out, "serving", {"rows": rows}, _table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME=DIR")
    parser.add_argument("--width", type=int, default=2048, help="of a random model")
    parser.add_argument("--layers", type=int, default=4, help="its blocks")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512], help="their tokens")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--compiled", action="store_true", help="by tnlm.compile_decoding")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, with one thread")
    add_options(parser, keep_targets=(0.8, 0.6), repeats=9)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    asked = parser.parse_args()
    if asked.cpu_time and torch.get_num_threads() > 1:
        parser.error("--cpu-time adds up threads; set OMP_NUM_THREADS=1")
    return asked


def _models(asked: argparse.Namespace) -> tuple[str, Models]:
    if not asked.models:
        asked.hidden, asked.precision = asked.width, None
        asked.intermediate = 8 * asked.width // 3 // 16 * 16
        return whole_models.random_models(asked)
    folders = dict(named.split("=", 1) for named in asked.models)
    # Copies, because weights that are mapped from a file may be read at another speed.
    models = {n: copy.deepcopy(load_model(d, dtype=torch.float32)[0]) for n, d in folders.items()}
    return next(iter(folders.values())).rstrip("/").rpartition("/")[2], models


def _measured(models: Models, batch: int, prompt: int, asked: argparse.Namespace) -> list[Row]:
    """Return a row for every model at a batch and a length of prompts."""
    first: dict[str, list[float]] = {name: [] for name in models}
    between: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(asked.repeats + 1):
        for name, each in models.items():
            start, _, *came = _arrivals(each, batch, prompt, asked)
            if turn > 0:  # the first turn is a warm-up, and compiles
                first[name].append(came[0] - start)
                between[name].append(statistics.median(b - a for a, b in itertools.pairwise(came)))
    base = next(iter(models))
    return [
        {
            "batch": f"{batch}",
            "prompt": f"{prompt}",
            "variant": name,
            "first_seconds": statistics.median(first[name]),
            "between_seconds": statistics.median(between[name]),
            "first_speed": _speed(first, base, name),
            "between_speed": _speed(between, base, name),
            "weight_bytes": weight_bytes(each),
            "cache_bytes": batch * (prompt + asked.new_tokens) * _cached(each),
            "turns": asked.repeats,
            "clock": "processor" if asked.cpu_time else "wall",
        }
        for name, each in models.items()
    ]


def _arrivals(
    each: PreTrainedModel, batch: int, prompt: int, asked: argparse.Namespace
) -> list[float]:
    """Return the time of the start, and when the prompt and every new token came."""
    ids = (torch.arange(batch * prompt) % 500 + 5).reshape(batch, prompt)
    length = {"max_new_tokens": asked.new_tokens, "min_new_tokens": asked.new_tokens}
    mask = torch.ones_like(ids)
    came = Arrivals(time.process_time if asked.cpu_time else time.perf_counter)
    each.generate(
        ids, attention_mask=mask, do_sample=False, streamer=came, pad_token_id=0, **length
    )
    return came.times


def _speed(times: dict[str, list[float]], base: str, name: str) -> float:
    return statistics.median(b / a for b, a in zip(times[base], times[name], strict=True))


def _cached(each: PreTrainedModel) -> int:
    """Return the bytes of keys and values for one token."""
    config = each.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = config.num_hidden_layers * config.num_key_value_heads * head
    return 2 * values * each.dtype.itemsize


def _table(rows: list[Row]) -> str:
    case = ("machine", "model", "dtype", "decoding", "batch", "prompt", "variant")
    head = [*case[:-1], "", "first token, ms", "speed", "between tokens, ms", "speed"]
    head += ["MB of weights", "of keys and values", "turns", "clock"]
    lines = [
        [
            *(row[key] for key in case),
            f"{1e3 * row['first_seconds']:.0f}",
            f"{row['first_speed']:.2f}",
            f"{1e3 * row['between_seconds']:.1f}",
            f"{row['between_speed']:.2f}",
            f"{row['weight_bytes'] / 1e6:,.0f}",
            f"{row['cache_bytes'] / 1e6:,.0f}",
            row["turns"],
            row["clock"],
        ]
        for row in rows
    ]
    return table(head, lines)


if __name__ == "__main__":
    main()
