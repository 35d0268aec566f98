"""How large models of common shapes become: a table from the library's own cost code."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tnlm.allocation.pricing import model_cost
from tnlm.decompositions import get_format
from tnlm.precision.grid import least_bytes, precision_of
from tnlm.targets.selection import select
from tnlm.tensors.network import Cost

SHAPES = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""The shapes of Llama 3.2 1B, Llama 3.1 8B and 70B, with a vocabulary of 128,256."""
RECIPES: dict[str, tuple[float, str | None]] = {
    "as it is": (1.0, None),
    'low rank or fewer channels, `"auto", keep_targets=0.8`': (0.8, None),
    "the same at `keep_targets=0.6`": (0.6, None),
    '`"gptq", precision="int8"`': (1.0, "int8"),
    '`"auto", keep_targets=0.8, precision="int8"`': (0.8, "int8"),
    '`"gptq", precision="int4"`': (1.0, "int4"),
    '`"auto", keep_targets=0.8, precision="int4"`': (0.8, "int4"),
}
"""The fraction of the linear layers' parameters to keep, and the bits of the rest, by call."""
ITEMSIZE = 2
"""Bytes of a weight in bfloat16."""


def size(shape: dict[str, int], keep: float = 1.0, precision: str | None = None) -> Cost:
    """Return the cost of a model of a shape, its linear layers compressed to one size.

    Every matrix is priced as low rank with the gauge fixed, which is what every structure of the
    same size takes up to rounding. One block is built, without memory for it.

    Args:
        shape: options of ``LlamaConfig``.
        keep: fraction of the parameters of every matrix of the blocks to keep.
        precision: name of the precision in which they are stored.
    """
    blocks = shape["num_hidden_layers"]
    config = LlamaConfig(vocab_size=128_256, **{**shape, "num_hidden_layers": 1})
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    whole, after, before = model_cost(model), Cost(0, 0, 0), Cost(0, 0, 0)
    norms = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 1)
    structure = get_format("low-rank")
    for target in select(model).targets:
        network = None
        cost = target.dense_cost(ITEMSIZE)
        before += cost
        if keep < 1.0:
            spec = structure.candidates(target.shape, {}, target.budget(keep, 1.0))[0]
            network = structure.network(target.shape, spec)
            cost = target.cost(network, ITEMSIZE)
        stored = cost.bytes
        if precision is not None:
            shapes = target.packed_shapes(network)
            plain = sum(rows * columns for rows, columns in shapes) * ITEMSIZE
            stored += least_bytes(shapes, precision_of(precision), ITEMSIZE) - plain
        after += Cost(cost.params, stored, cost.macs)
    outside = Cost(
        whole.params - before.params - norms,
        whole.bytes - before.bytes - norms * ITEMSIZE,
        whole.macs - before.macs,
    )
    return Cost(
        outside.params + blocks * (after.params + norms),
        outside.bytes + blocks * (after.bytes + norms * ITEMSIZE),
        outside.macs + blocks * after.macs,
    )


def sizes_table() -> str:
    """Return gigabytes and multiply-adds of every shape and recipe, as a table in Markdown."""
    lines = [f"| weights | {' | '.join(f'{name} | multiply-adds' for name in SHAPES)} |"]
    lines.append("|---" * (1 + 2 * len(SHAPES)) + "|")
    for recipe, (keep, precision) in RECIPES.items():
        costs = [size(shape, keep, precision) for shape in SHAPES.values()]
        cells = [f"{cost.bytes / 1e9:.1f} GB | {cost.macs / 1e9:.1f} G" for cost in costs]
        lines.append(f"| {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
