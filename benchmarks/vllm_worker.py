"""Serves one directory in vLLM for benchmarks/vllm_serving.py; run by a Python that has vLLM.

It reads one JSON object a line, ``{"prompts": [token ids, ...], "count": tokens}``, generates
greedily for all prompts at once, and prints a line that begins with ``RESULT``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--length", type=int, required=True, help="Most tokens of one sequence.")
    parser.add_argument("--batch", type=int, required=True, help="Most sequences at once.")
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        asked.directory,
        skip_tokenizer_init=True,
        dtype=asked.dtype,
        enforce_eager=not asked.compile,
        enable_prefix_caching=False,  # every turn has the same prompts
        max_model_len=asked.length,
        max_num_seqs=asked.batch,
    )
    for line in sys.stdin:
        order = json.loads(line)
        wanted = SamplingParams(
            temperature=0, max_tokens=order["count"], ignore_eos=True, detokenize=False
        )
        prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
        start = time.perf_counter()
        made = engine.generate(prompts, wanted, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(each.outputs[0].token_ids) for each in made]
        found = {"seconds": seconds, "tokens": tokens, "threads": torch.get_num_threads()}
        print("RESULT", json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
