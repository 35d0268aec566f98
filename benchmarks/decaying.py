"""Writes a Llama with random weights whose singular values decay by a power law.

    python benchmarks/decaying.py OUT --hidden 4096 --layers 2 --decay 1

The i-th singular value of every matrix of the blocks is proportional to i to the power of -decay;
0 makes all equal. Each matrix has the norm that the usual random weights would have. Singular
vectors are those of one random orthogonal matrix a size, with rows permuted and signs drawn anew
for every matrix.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def main() -> None:
    """Draw the model and save it in bfloat16."""
    asked = _arguments()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=asked.vocabulary,
        hidden_size=asked.hidden,
        intermediate_size=asked.intermediate,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 128),
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    decay(model, asked.decay)
    model.bfloat16().save_pretrained(asked.out)


@torch.no_grad()
def decay(model: LlamaForCausalLM, power: float) -> None:
    """Give every matrix of the blocks singular values that decay by a power.

    Example:
        >>> tiny = LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        ...                    num_attention_heads=2, vocab_size=16)
        >>> model = LlamaForCausalLM(tiny)
        >>> decay(model, 1.0)
        >>> values = torch.linalg.svdvals(model.model.layers[0].mlp.up_proj.weight)
        >>> [round((v / values[0]).item(), 3) for v in values[:4]]
        [1.0, 0.5, 0.333, 0.25]
    """
    generator = torch.Generator().manual_seed(0)
    layers = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    rank = min(min(layer.weight.shape) for layer in layers)
    sizes = {size for layer in layers for size in layer.weight.shape}
    bases = {size: _orthonormal(size, rank, generator) for size in sorted(sizes)}
    values = torch.arange(1, rank + 1, dtype=torch.float32) ** -power
    for layer in layers:
        norm = layer.weight.float().norm()
        left, right = (_turned(bases[size], generator) for size in layer.weight.shape)
        layer.weight.copy_((left * values * (norm / values.norm())) @ right.T)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]


def _turned(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the rows, and draw their signs."""
    order = torch.randperm(len(basis), generator=generator)
    signs = torch.randint(2, (len(basis), 1), generator=generator) * 2 - 1
    return basis[order] * signs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--decay", type=float, default=1.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
