"""Moves a Llama's weights off the grid of its file, without changing what it computes.

A model read from a file of 4 bits has weights on that file's grid, which flatters every method of
4 bits or fewer. Here the scales of norms are folded into the layers that follow, the residual
stream and every head's values are rotated by random orthogonal matrices, and hidden channels are
permuted. Logits stay the same up to rounding; a tied head becomes a weight of its own.

    python benchmarks/off_grid.py MODEL OUT
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import tnlm

logger = logging.getLogger("off_grid")


@torch.no_grad()
def off_grid(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Rotate and permute a Llama in place, and return it.

    Args:
        model: of Llama's architecture, in any floating dtype.
        seed: draws the rotations and permutations.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = LlamaForCausalLM(tiny).double().eval()
        >>> ids = torch.arange(8).unsqueeze(0)
        >>> before = model(ids).logits
        >>> bool(torch.allclose(off_grid(model)(ids).logits, before))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    whole: Any = model
    config = whole.config
    tnlm.rotate(model, rotation(config.hidden_size, generator), untie=True)
    for block in whole.model.layers:
        attention, mlp = block.self_attn, block.mlp
        _rotate_heads(attention, config, generator)
        order = torch.randperm(config.intermediate_size, generator=generator)
        for producer in (mlp.gate_proj, mlp.up_proj):
            _write(producer, producer.weight[order])
        _write(mlp.down_proj, mlp.down_proj.weight[:, order])
    return model


def rotation(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float64."""
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(drawn)
    rotated: Tensor = basis * upper.diagonal().sign()
    return rotated


def _rotate_heads(attention: Any, config: Any, generator: torch.Generator) -> None:
    """Rotate the values of every head, and what the output projection makes of them."""
    size = attention.head_dim
    groups = config.num_attention_heads // config.num_key_value_heads
    turns = [rotation(size, generator) for _ in range(config.num_key_value_heads)]
    values = attention.v_proj.weight.double().unflatten(0, (-1, size))
    _write(attention.v_proj, torch.cat([turn @ v for turn, v in zip(turns, values, strict=True)]))
    outputs = attention.o_proj.weight.double().unflatten(1, (-1, size)).unbind(1)
    turned = [out @ turns[head // groups].T for head, out in enumerate(outputs)]
    _write(attention.o_proj, torch.cat(turned, 1))


def _write(module: Any, weight: Tensor) -> None:
    module.weight.copy_(weight)


def main() -> None:
    """Read, rotate, compare, write."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description="Move a Llama's weights off their grid.")
    parser.add_argument("model", help="directory of a model")
    parser.add_argument("out", help="directory to write")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = torch.arange(64).unsqueeze(0) % model.config.vocab_size
    with torch.no_grad():
        before = model(ids).logits
        apart = (off_grid(model)(ids).logits - before).abs().max() / before.abs().max()
    logger.info("largest change of a logit, relative to the largest: %.2g", float(apart))
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)


if __name__ == "__main__":
    main()
