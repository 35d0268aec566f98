"""Predicted against measured time of whole models: how right the prices of `unit="time"` are.

    python benchmarks/predicted.py [--widths 576 2048] [--layers 6] [--keep-targets 0.8 0.6]
        [--dtypes float32 bfloat16] [--prefill 512] [--out DIR]

Random Llamas are measured dense, of low rank, as Kronecker sums, and with narrower feed-forward
layers, decoding at batch 1 and over a prompt. As a plan does, the prediction takes the time of the
dense model as it was measured, and from its layers on the prices of this machine, which are
measured anew if there are none in ``$TNLM_HOME``. All variants take turns; times are medians, and
"off" is predicted over measured, less 1.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from random_layers import random_layer, random_low_rank, spec_within
from timing import DTYPES, add_options, table, with_earlier, write
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tnlm.decompositions import get_format
from tnlm.evaluation.speed import timed_decoding
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.machine import Machine, machine
from tnlm.layers.pricing import layer_time

QUICK = {
    "widths": [192],
    "layers": 1,
    "keep_targets": [0.6],
    "dtypes": ["float32"],
    "prefill": 16,
    "repeats": 2,
}
CONTEXT, STEPS = 16, 8
"""Tokens before those that are decoded, and steps of a turn."""

Row = dict[str, Any]
Models = Mapping[str, LlamaForCausalLM]


def main() -> None:
    """Measure all widths, then write the table."""
    asked = _arguments()
    rows: list[Row] = []
    for width in asked.widths:
        dense = _dense(width, asked.layers)
        models = {"dense": dense} | _variants(dense, asked.keep_targets)
        for dtype in asked.dtypes:
            for model in models.values():
                model.to(DTYPES[dtype])
            case = {"width": f"{width}, {asked.layers} blocks", "dtype": dtype}
            rows += [case | row for row in _compared(models, DTYPES[dtype], asked)]
    write(
        asked.out,
        "predicted",
        {"rows": with_earlier(asked.out, "predicted", "rows", rows)},
        _table(rows),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--layers", type=int, default=6, help="blocks")
    parser.add_argument("--prefill", type=int, default=512, help="tokens of the prompt")
    add_options(parser, keep_targets=(0.8, 0.6), repeats=9)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def _dense(width: int, layers: int) -> LlamaForCausalLM:
    """Return a Llama with SmolLM2's proportions: three or four heads share a key and value."""
    heads = width // 64
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        head_dim=64,
        intermediate_size=8 * width // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // (4 if heads % 3 else 3),
    )
    return LlamaForCausalLM(config).eval()


def _variants(dense: LlamaForCausalLM, shares: list[float]) -> dict[str, LlamaForCausalLM]:
    found = {}
    for keep in shares:
        found[f"low rank, {keep:g}"] = _replaced(dense, "low-rank", keep)
        found[f"Kronecker sum, {keep:g}"] = _replaced(dense, "kronecker", keep)
        found[f"narrowed, {keep:g}"] = _narrowed(dense, keep)
    return found


def _replaced(dense: LlamaForCausalLM, form: str, keep: float) -> LlamaForCausalLM:
    """Return a copy whose blocks hold random layers of a format in place of their linear ones."""
    model = copy.deepcopy(dense)
    for name, old in list(model.model.layers.named_modules()):
        if isinstance(old, nn.Linear):
            shape, dtype = (old.out_features, old.in_features), old.weight.dtype
            if form == "low-rank":
                layer = random_low_rank(shape, keep, dtype)
            else:
                network = get_format(form).network(shape, spec_within(form, shape, keep))
                layer = random_layer(network, dtype)
            model.model.layers.set_submodule(name, layer)
    return model


def _narrowed(dense: LlamaForCausalLM, keep: float) -> LlamaForCausalLM:
    """Return a model whose feed-forward layers alone are narrower, to a share of their width."""
    config = copy.deepcopy(dense.config)
    config.intermediate_size = int(keep * config.intermediate_size)
    return LlamaForCausalLM(config).eval()


def _compared(models: Models, dtype: torch.dtype, asked: argparse.Namespace) -> list[Row]:
    """Return rows with the measured and the predicted milliseconds of all models."""
    prices = machine(dtype)
    passes = {
        "decode": (1, CONTEXT, STEPS),
        f"prefill {asked.prefill}": (asked.prefill,) * 2 + (0,),
    }
    rows = []
    for name, (tokens, prompt, steps) in passes.items():
        measured = _measured(models, prompt, steps, asked.repeats)
        layers = {of: _layers_time(model, prices, tokens) for of, model in models.items()}
        for of in models:
            predicted = measured["dense"] - layers["dense"] + layers[of]
            row = {"pass": name, "variant": of, "predicted": predicted, "measured": measured[of]}
            rows.append(row | {"layers": layers[of], "off": predicted / measured[of] - 1})
    return rows


def _measured(models: Models, prompt: int, steps: int, repeats: int) -> dict[str, float]:
    """Return the median seconds of a step, or of the pass over the prompt without any."""
    ids = torch.arange(prompt)[None] % 512
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for turn in range(repeats + 1):
            for name, model in models.items():
                first, after = timed_decoding(model, ids, steps)
                if turn > 0:  # the first turn is a warm-up
                    times[name].append(after / steps if steps else first)
    return {name: statistics.median(found) for name, found in times.items()}


def _layers_time(model: LlamaForCausalLM, prices: Machine, tokens: int) -> float:
    """Return the seconds that the linear layers of the blocks are predicted to take."""
    seconds, size = 0.0, model.dtype.itemsize
    for name, layer in model.model.layers.named_modules():
        if isinstance(layer, FactorizedLinear):
            seconds += layer_time(layer.network, prices, size, tokens)
        elif name.endswith("_proj"):
            shape = layer.out_features, layer.in_features
            seconds += layer_time(shape, prices, size, tokens, arranged=False)
    return seconds


def _table(rows: list[Row]) -> str:
    head = ["width", "dtype", "pass", "", "measured, ms", "predicted, ms", "off", "layers, ms"]
    lines = [
        [
            *(row[key] for key in ("width", "dtype", "pass", "variant")),
            *(f"{1e3 * row[key]:.2f}" for key in ("measured", "predicted")),
            f"{row['off']:+.0%}",
            f"{1e3 * row['layers']:.2f}",
        ]
        for row in rows
    ]
    return table(head, lines)


if __name__ == "__main__":
    main()
