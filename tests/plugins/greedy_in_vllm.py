"""Prints greedy tokens and their log-probabilities; run by a Python that has vLLM, not tnlm."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve each directory in turn, and write ``vllm.json`` into it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", nargs="+", type=Path)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: lists of token ids.")
    parser.add_argument("--count", type=int, default=8)
    asked = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    prompts = json.loads(asked.prompts.read_text())
    for directory in asked.directories:
        (directory / "vllm.json").write_text(json.dumps(_greedy(directory, prompts, asked.count)))


def _greedy(directory: Path, prompts: list[list[int]], count: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    try:
        engine = LLM(
            str(directory),
            skip_tokenizer_init=True,
            dtype="float32",  # "auto" makes bfloat16 of it
            enforce_eager=True,
            max_model_len=64,
            max_num_seqs=len(prompts),
        )
    except Exception as error:  # what a user would read
        return {"error": f"{type(error).__name__}: {error}"}
    wanted = SamplingParams(
        temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=1
    )
    made = engine.generate([{"prompt_token_ids": each} for each in prompts], wanted)
    outputs = [each.outputs[0] for each in made]
    return {
        "tokens": [list(each.token_ids) for each in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(each.logprobs, each.token_ids, strict=True)]
            for each in outputs
        ],
    }


if __name__ == "__main__":
    main()
