"""Speed and size of whole models against dense: prefill, decoding, bytes of weights.

    python benchmarks/model.py [MODEL] [--models real random] [--keep-targets 0.8 0.6]
        [--dtypes float32 bfloat16] [--precision int8] [--compressed NAME=DIR ...] [--out DIR]

Two models are measured, dense and of low rank. The real one, MODEL, is the demo's if not given, and
is compressed by plain SVD. The random one has Llama-7B's blocks, few of them, and a tiny
vocabulary; its matrices are replaced by random factors of the ranks that ``tnlm.compress`` would
choose, since speed does not depend on values and the SVD of such matrices takes long. With a
precision there are also the dense model in few bits, its embedding and head as well, and a random
one whose feed-forward layers are narrowed to the size. All variants of a model take turns in one
process; rates are medians, and ratios are to dense. Rows of other machines in DIR stay there.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_layers import random_low_rank
from timing import DTYPES, add_options, speed, table, take_turns, weight_bytes, with_earlier, write
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.cli.demo import find_model
from tnlm.evaluation import decode_rates

QUICK = {
    "models": ["random"],
    "keep_targets": [0.6],
    "dtypes": ["float32"],
    "layers": 1,
    "prompt_tokens": 256,
    "new_tokens": 8,
    "repeats": 2,
}
WORDS = 512
"""Words of the random model, so that its blocks are what is measured."""
CONTEXT = 16
"""Tokens before those that are decoded."""

Row = dict[str, Any]
Variants = dict[str, PreTrainedModel]


def main() -> None:
    """Measure the models one after the other, then write the table."""
    asked = _arguments()
    rows: list[Row] = []
    makers = {"real": _real, "random": random_models}
    for model in asked.models:
        print(f"making the {model} model ...", file=sys.stderr, flush=True)
        name, variants = makers[model](asked)
        for dtype in asked.dtypes:
            print(f"measuring it in {dtype} ...", file=sys.stderr, flush=True)
            for variant in variants.values():
                variant.to(DTYPES[dtype])
            common = {"model": name, "dtype": dtype}
            rows += [common | row for row in _measure(variants, asked)]
    rows = with_earlier(asked.out, "model", "models", rows)
    settings = {"prefill_tokens": asked.prompt_tokens, "decoded_tokens": asked.new_tokens}
    write(asked.out, "model", {**settings, "models": rows}, _table(rows, asked))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="directory, .gguf file or hub id")
    parser.add_argument(
        "--models", nargs="+", choices=("real", "random"), default=["real", "random"]
    )
    parser.add_argument("--layers", type=int, default=2, help="blocks of the random model")
    parser.add_argument("--hidden", type=int, default=4096, help="its width")
    parser.add_argument("--intermediate", type=int, default=11008, help="that of its feed-forwards")
    parser.add_argument(
        "--compressed", nargs="+", default=[], metavar="NAME=DIR", help="saved variants of MODEL"
    )
    parser.add_argument("--precision", help="measure packed models too, such as int8")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="for prefill")
    parser.add_argument("--new-tokens", type=int, default=16, help="decoded in a turn")
    add_options(parser, keep_targets=(0.8, 0.6), repeats=5)
    if parser.parse_known_args()[0].quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def _real(asked: argparse.Namespace) -> tuple[str, Variants]:
    source = asked.model or find_model()
    loaded, _ = load_model(source, dtype=torch.float32)
    # A copy, because weights that are mapped from a file may be read at another speed.
    variants = {"dense": copy.deepcopy(loaded)}
    for keep in asked.keep_targets:
        model = copy.deepcopy(loaded)
        variants[_named(keep)] = tnlm.compress(model, "svd", keep_targets=keep, progress=False)
    for named in asked.compressed:
        name, _, folder = named.partition("=")
        variants[name] = tnlm.load(folder, dtype=torch.float32)
    return Path(source).name, variants | _packed(variants["dense"], asked)


def random_models(asked: argparse.Namespace) -> tuple[str, Variants]:
    """Return the name of a random Llama, and the model dense and of low rank."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=asked.hidden,
        intermediate_size=asked.intermediate,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 128),
    )
    dense = LlamaForCausalLM(config)
    variants: Variants = {"dense": dense}
    variants |= {_named(keep): _factorized(dense, keep) for keep in asked.keep_targets}
    blocks = f"{asked.layers} block{'s' * (asked.layers > 1)}"
    return f"Llama of width {asked.hidden}, {blocks}", variants | _packed(dense, asked)


def _packed(dense: Any, asked: argparse.Namespace) -> Variants:
    """Return the dense model in few bits, and narrowed ones with random weights."""
    if asked.precision is None:
        return {}
    models = {asked.precision: copy.deepcopy(dense)}
    for keep in asked.keep_targets:
        config = copy.deepcopy(dense.config)
        config.intermediate_size = _width(dense, keep)
        models[f"{asked.precision}, narrowed to {keep:g}"] = LlamaForCausalLM(config)
    choice = {"precision": asked.precision, "targets": ["all-linear", "embeddings"]}
    return {n: tnlm.compress(m, "rtn", progress=False, **choice) for n, m in models.items()}


def _width(dense: Any, keep: float) -> int:
    """Return the width of feed-forward layers at which the blocks have so many multiply-adds."""
    sizes = [m.weight.numel() for m in dense.model.layers.modules() if isinstance(m, nn.Linear)]
    hidden = dense.config.intermediate_size
    narrow = 3 * dense.config.hidden_size * dense.config.num_hidden_layers
    return int(hidden - (1 - keep) * sum(sizes) / narrow) // 16 * 16


def _factorized(dense: LlamaForCausalLM, keep: float) -> LlamaForCausalLM:
    """Return a copy whose blocks hold random low-rank layers in place of their linear ones."""
    model = copy.deepcopy(dense)
    for name, old in list(model.model.layers.named_modules()):
        if isinstance(old, nn.Linear):
            shape = old.out_features, old.in_features
            layer = random_low_rank(shape, keep, old.weight.dtype)
            model.model.layers.set_submodule(name, layer)
    return model


def _measure(variants: Variants, asked: argparse.Namespace) -> list[Row]:
    """Return a row for every variant of a model."""
    words = variants["dense"].config.get_text_config().vocab_size
    tokens = torch.arange(asked.prompt_tokens)[None] % words
    prefill = {name: [partial(_prefill, model.eval(), tokens)] for name, model in variants.items()}
    with torch.inference_mode():
        times = take_turns(prefill, asked.repeats)
    rates = decode_rates(
        variants, prompt_tokens=CONTEXT, new_tokens=asked.new_tokens, repeats=asked.repeats
    )
    sizes = {name: weight_bytes(model) for name, model in variants.items()}
    return [
        {
            "variant": name,
            "weight_bytes": sizes[name],
            "share_of_bytes": sizes[name] / sizes["dense"],
            "prefill_tokens_per_second": asked.prompt_tokens / statistics.median(times[name]),
            "prefill_speed": speed(times, name, "dense"),
            "decode_tokens_per_second": rates[name],
            "decode_speed": rates[name] / rates["dense"],
        }
        for name in variants
    ]


def _prefill(model: PreTrainedModel, tokens: Tensor) -> object:
    return model(input_ids=tokens, use_cache=True, logits_to_keep=1)


def _named(keep: float) -> str:
    return f"low rank, {keep:g} kept"


def _table(rows: Sequence[Row], asked: argparse.Namespace) -> str:
    prefill = f"prefill of {asked.prompt_tokens}, tokens/s"
    decode = f"decoding {asked.new_tokens} at batch 1, tokens/s"
    head = [
        "machine",
        "model",
        "dtype",
        "",
        "MB of weights",
        "of dense",
        prefill,
        "speed",
        decode,
        "speed",
    ]
    return table(head, map(_line, rows))


def _line(row: Row) -> list[str]:
    return [
        row["machine"],
        row["model"],
        row["dtype"],
        row["variant"],
        f"{row['weight_bytes'] / 1e6:,.0f}",
        f"{row['share_of_bytes']:.3f}",
        f"{row['prefill_tokens_per_second']:.1f}",
        f"{row['prefill_speed']:.2f}",
        f"{row['decode_tokens_per_second']:.2f}",
        f"{row['decode_speed']:.2f}",
    ]


if __name__ == "__main__":
    main()
