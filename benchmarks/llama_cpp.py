"""Exported models in real llama.cpp: decoding speed and perplexity, beside dense and transformers.

    tnlm export MODEL dense --to gguf && tnlm export COMPRESSED small --to gguf
    python benchmarks/llama_cpp.py dense/model-F16.gguf small/model-F16.gguf \
        --model COMPRESSED --text wiki.test.raw

It needs xllamacpp, which ``make test-serving`` installs. Speeds are taken in turns, dense and
small one after the other, and the median of their ratios is given. The perplexity is that of the
first tokens of the text, each predicted from those before it in the window.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
import xllamacpp

import tnlm  # registers compressed models
from tnlm.calibration.text import tokenize
from tnlm.checkpoint.dense_models import load_model


def main() -> None:
    """Print one JSON object."""
    asked = _arguments()
    small = _server(asked.small, asked.threads)
    found: dict[str, Any] = {
        "tnlm": tnlm.__version__,
        "threads": asked.threads,
        "megabytes": [round(path.stat().st_size / 1e6, 1) for path in (asked.dense, asked.small)],
    }
    found |= _speeds(_server(asked.dense, asked.threads), small, asked.turns, asked.tokens)
    if asked.model:
        model, tokenizer = load_model(asked.model, dtype="float32")
        text = asked.text.read_text()[: 16 * asked.window * asked.windows]
        ids = tokenize(text, tokenizer)[: asked.window * asked.windows]
        windows = ids.reshape(asked.windows, asked.window)
        found["perplexity_transformers"] = _perplexity(_losses(model, windows))
        found["perplexity_llama_cpp"] = _perplexity(_surprises(small, windows))
    print(json.dumps(found, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dense", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--model", help="What the small file was exported from.")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def _server(path: Path, threads: int) -> Any:
    wanted = xllamacpp.CommonParams()
    wanted.model.path, wanted.n_ctx, wanted.cpuparams.n_threads = str(path), 512, threads
    return xllamacpp.Server(wanted)


def _speeds(dense: Any, small: Any, turns: int, tokens: int) -> dict[str, Any]:
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "cache_prompt": False}
    speeds = [
        [
            each.handle_completions(body)["timings"]["predicted_per_second"]
            for each in (dense, small)
        ]
        for _ in range(turns + 1)
    ][1:]
    return {
        "tokens_per_second": [
            round(statistics.median(column), 1) for column in zip(*speeds, strict=True)
        ],
        "ratio": round(statistics.median(b / a for a, b in speeds), 3),
    }


@torch.no_grad()
def _losses(model: Any, windows: torch.Tensor) -> list[float]:
    """Return the loss of every token but the first of each window, in transformers."""
    logits = model(windows).logits[:, :-1].double().log_softmax(-1)
    return (-logits.gather(-1, windows[:, 1:, None])).flatten().tolist()


def _surprises(server: Any, windows: torch.Tensor) -> list[float]:
    """Return the same from llama.cpp, asked for the whole distribution token by token."""
    found = []
    for window in windows.tolist():
        for end in range(1, len(window)):
            body = {"prompt": window[:end], "max_tokens": 1, "logprobs": 1_000_000}
            asked = server.handle_completions(body | {"temperature": 0, "cache_prompt": True})
            listed = asked["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found.append(-next(e["logprob"] for e in listed if e["id"] == window[end]))
    return found


def _perplexity(losses: list[float]) -> float:
    return math.exp(statistics.fmean(losses))


if __name__ == "__main__":
    main()
