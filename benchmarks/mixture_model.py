"""Train the small mixture of experts that `mixture.py` measures; resumable.

    python benchmarks/mixture_model.py

A Mixtral of 4 blocks and 8 experts, of which a token meets 2: 4.7 M parameters, 3.9 M of them in
experts. It learns from the text that Python ships, as `python_models.py` says, with a router loss
of 0.02.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from python_models import STEPS, VOCABULARY, WINDOW, trained
from transformers import MixtralConfig, MixtralForCausalLM


def main() -> None:
    """Train, unless that is done, and say where the model is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    model, _, folder = trained_mixture(parser.parse_args().steps)
    print(f"{folder}: {model.num_parameters():,} parameters")


def trained_mixture(steps: int) -> tuple[Any, Any, Path]:
    """Return the model, its tokenizer, and their folder, in the user's cache of tnlm."""
    return trained("mixture", make_model, steps, output_router_logits=True)


def make_model(seed: int = 0) -> MixtralForCausalLM:
    """Draw an untrained mixture."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.02,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config)


if __name__ == "__main__":
    main()
