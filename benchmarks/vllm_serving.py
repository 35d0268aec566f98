"""Compressed models in real vLLM: greedy tokens beside transformers', speed beside dense.

    python benchmarks/vllm_serving.py tokens MODEL --text wiki.test.raw
    python benchmarks/vllm_serving.py speed --width 2048 --keep 0.6

``--python`` names one that has vLLM and tnlm-vllm; ``make test-serving`` makes it. ``tokens``
exports a model, and generates greedily for prompts cut from a text, all at once, in float32. Where
a sequence differs, it gives how much less likely vLLM's first other token is in transformers than
the best one. ``speed`` makes two random models of one config, dense and factored, and serves both
in processes of their own, in turns: tokens generated a second, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tnlm  # registers compressed models
from tnlm.calibration.text import tokenize
from tnlm.checkpoint.dense_models import load_model

WORKER = Path(__file__).with_name("vllm_worker.py")


def main() -> None:
    """Print one JSON object."""
    asked = _arguments()
    found = _tokens(asked) if asked.what == "tokens" else _speed(asked)
    print(json.dumps({"tnlm": tnlm.__version__} | found, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--python", default=".venv-vllm/bin/python")
    shared.add_argument("--threads", type=int, default=2)
    shared.add_argument("--prompts", type=int, default=20)
    shared.add_argument("--prompt-tokens", type=int, default=32)
    shared.add_argument("--count", type=int, default=48, help="Tokens generated for each prompt.")
    shared.add_argument("--compile", action="store_true", help="Let vLLM compile the model.")
    kinds = parser.add_subparsers(dest="what", required=True)
    tokens = kinds.add_parser("tokens", parents=[shared])
    tokens.add_argument("model", help="A compressed model.")
    tokens.add_argument("--text", type=Path, required=True)
    speed = kinds.add_parser("speed", parents=[shared])
    speed.add_argument("--width", type=int, default=2048)
    speed.add_argument("--layers", type=int, default=6)
    speed.add_argument("--vocabulary", type=int, default=32000)
    speed.add_argument("--keep", type=float, default=0.6, help="Of the parameters of the targets.")
    speed.add_argument("--scheme", default="svd")
    speed.add_argument("--option", nargs="*", default=[], help="Of the scheme: name=JSON.")
    speed.add_argument("--dtype", default="bfloat16")
    speed.add_argument("--turns", type=int, default=7)
    return parser.parse_args()


class Server:
    """vLLM with one directory, in a process of its own.

    Args:
        directory: what it serves.
        dtype: of weights and activations.
        asked: the arguments of the script.
    """

    def __init__(self, directory: Path, dtype: str, asked: argparse.Namespace) -> None:
        """Start the process."""
        length = asked.prompt_tokens + asked.count
        words = [asked.python, WORKER, directory, "--dtype", dtype, "--length", length]
        words += ["--batch", asked.prompts] + ["--compile"] * asked.compile
        self._process: Any = subprocess.Popen(
            [str(word) for word in words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Idle threads of the one process must not spin while the other is measured.
            env=os.environ | {"OMP_NUM_THREADS": str(asked.threads), "OMP_WAIT_POLICY": "passive"},
        )

    def generate(self, prompts: list[list[int]], count: int) -> dict[str, Any]:
        """Return the tokens for all prompts, and the seconds they took."""
        self._process.stdin.write(json.dumps({"prompts": prompts, "count": count}) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("RESULT"):
                found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
                return found
        raise SystemExit(f"vLLM ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@torch.no_grad()
def _tokens(asked: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer = load_model(asked.model, dtype="float32")
    text = asked.text.read_text()[: 40 * asked.prompts * asked.prompt_tokens]
    ids = tokenize(text, tokenizer)[: asked.prompts * asked.prompt_tokens]
    prompts = ids.reshape(asked.prompts, asked.prompt_tokens)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(prompts)
    made = model.generate(
        prompts, attention_mask=mask, max_new_tokens=asked.count, do_sample=False, pad_token_id=0
    )[:, asked.prompt_tokens :]
    with tempfile.TemporaryDirectory() as folder:
        tnlm.export(model, Path(folder) / "small", to="vllm")
        server = Server(Path(folder) / "small", "float32", asked)
        theirs = torch.tensor(server.generate(prompts.tolist(), asked.count)["tokens"])
        server.close()
    others = [row for row in range(asked.prompts) if not made[row].equal(theirs[row])]
    return {
        "prompts": asked.prompts,
        "equal": asked.prompts - len(others),
        "others": [_difference(model, prompts[row], made[row], theirs[row]) for row in others],
    }


def _difference(model: Any, prompt: Any, ours: torch.Tensor, theirs: torch.Tensor) -> Any:
    """Return where two sequences part, and how near their tokens are there in transformers."""
    place = int((ours != theirs).nonzero()[0, 0])
    logits = model(torch.cat([prompt, ours[:place]])[None]).logits[0, -1].double().log_softmax(-1)
    return {"token": place, "log_ratio": float(logits[ours[place]] - logits[theirs[place]])}


def _speed(asked: argparse.Namespace) -> dict[str, Any]:
    dense, small = _random_models(asked)
    prompts = torch.randint(0, asked.vocabulary, (asked.prompts, asked.prompt_tokens)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder) / name for name in ("dense", "small")]
        for model, place in zip((dense, small), places, strict=True):
            tnlm.export(model, place, to="vllm")
        sizes = [model.num_parameters() for model in (dense, small)]
        bytes_ = [sum(f.stat().st_size for f in p.glob("*.safetensors")) for p in places]
        del dense, small, model
        servers = [Server(place, asked.dtype, asked) for place in places]
        made = [
            [server.generate(prompts, asked.count) for server in servers]
            for _ in range(asked.turns + 1)
        ][1:]
        for server in servers:
            server.close()
    turns = [[each["seconds"] for each in turn] for turn in made]
    tokens = asked.prompts * asked.count
    return {
        "threads": [each["threads"] for each in made[0]],
        "parameters": sizes,
        "megabytes": [round(size / 1e6, 1) for size in bytes_],
        "tokens_per_second": [
            round(tokens / statistics.median(column), 1) for column in zip(*turns, strict=True)
        ],
        "ratio": round(statistics.median(a / b for a, b in turns), 3),
        "ratios": [round(a / b, 3) for a, b in turns],
    }


def _random_models(asked: argparse.Namespace) -> tuple[Any, Any]:
    config = LlamaConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.width,
        intermediate_size=asked.width * 11 // 4,
        num_hidden_layers=asked.layers,
        num_attention_heads=asked.width // 64,
        num_key_value_heads=max(asked.width // 256, 1),
        max_position_embeddings=2048,
        dtype=asked.dtype,
        architectures=["LlamaForCausalLM"],
    )
    options = {name: json.loads(value) for name, _, value in map(_parted, asked.option)}
    small = tnlm.from_config(
        config, asked.scheme, keep_targets=asked.keep, dtype=asked.dtype, **options
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(getattr(torch, asked.dtype)), small


def _parted(word: str) -> tuple[str, str, str]:
    return word.partition("=")


if __name__ == "__main__":
    main()
