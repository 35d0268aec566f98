"""Compare `auto` on a Llama with `auto` on the same model with fused projections, as in Phi-3.

    python benchmarks/fused.py MODEL CALIBRATION.txt TEST.txt --keep 0.6 --targets PATTERN

The copy computes the same function: q, k and v are one matrix, gate and up another. Prints the
ratio of the perplexities after and before, of both.
"""

from __future__ import annotations

import argparse
import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import tnlm
from tnlm.evaluation.perplexity import perplexity

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip


def main() -> None:
    """Measure both."""
    asked = _arguments()
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    llama = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    data = {"num_samples": asked.windows, "gradient_samples": asked.windows}
    for model in (llama, fused(llama)):
        before = perplexity(model, asked.test, tokenizer, window=256, windows=asked.test_windows)
        tnlm.compress(
            model,
            "auto",
            targets=asked.targets,
            keep_targets=asked.keep,
            calibration=asked.calibration,
            tokenizer=tokenizer,
            max_length=asked.length,
            progress=False,
            **data,
        )
        after = perplexity(model, asked.test, tokenizer, window=256, windows=asked.test_windows)
        old, new = before.perplexity, after.perplexity
        print(f"{type(model).__name__}: {old:.4f} to {new:.4f}, ratio {new / old:.5f}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--keep", type=float, default=0.6, help="of the targets")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--windows", type=int, default=16, help="of calibration")
    parser.add_argument("--length", type=int, default=256, help="tokens of these")
    parser.add_argument("--test-windows", type=int, default=16, help="of 256 tokens")
    return parser.parse_args()


@torch.no_grad()
def fused(llama: LlamaForCausalLM) -> Phi3ForCausalLM:
    """Return the same model as a Phi-3."""
    config: Any = llama.config
    sizes = {name: getattr(config, name) for name in SIZES}
    sizes["pad_token_id"] = config.pad_token_id or 0
    made = Phi3ForCausalLM(
        Phi3Config(
            **sizes,
            original_max_position_embeddings=config.max_position_embeddings,
            rope_parameters=copy.deepcopy(config.rope_parameters),
        )
    )
    weights = llama.state_dict()
    for name in [name for name in weights if name.endswith(("q_proj.weight", "gate_proj.weight"))]:
        parts, whole = (("q", "k", "v"), "qkv") if "q_proj" in name else (("gate", "up"), "gate_up")
        names = [name.replace(f"{parts[0]}_proj", f"{part}_proj") for part in parts]
        held = torch.cat([weights.pop(each) for each in names])
        weights[name.replace(f"{parts[0]}_proj", f"{whole}_proj")] = held
    made.load_state_dict(weights)
    made.generation_config = llama.generation_config
    return made.to(llama.dtype).eval()


if __name__ == "__main__":
    main()
