"""Compressed models as ONNX, in ONNX Runtime and OpenVINO: sizes and speeds beside dense.

    pip install onnx onnxscript onnxruntime openvino
    python benchmarks/exported.py --hidden 1024 --layers 2 --out OUT

A random Llama is compressed in several ways, exported by transformers to ONNX for any batch and
length, and run in torch, in ONNX Runtime and in OpenVINO, in float32, which reads the same file.
Each runtime's speeds are relative to the dense model in that runtime; all variants take turns.
Error: the largest difference of a logit from torch's, relative to the largest logit.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from timing import table, take_turns, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.exporters import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

import tnlm

Logits = Callable[[Tensor], Any]
"""Runs a model on token ids ``(1, length)``."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "low rank": ("svd", {"keep_targets": 0.6}),
    "Kronecker": ("kron", {"terms": 2}),
    "narrowed": ("auto", {"keep_targets": 0.8, "portable": "llama.cpp"}),
    "int8": ("rtn", {"precision": "int8"}),
    "low rank, int8": ("svd", {"keep_targets": 0.6, "precision": "int8"}),
}
"""By the name in the table: the scheme and its options."""
WORDS = 512


def main() -> None:
    """Export and measure every variant, then write the table."""
    asked = _arguments()
    models = {"dense": _llama(asked)} | {name: _made(name, asked) for name in VARIANTS}
    rows: dict[str, dict[str, Any]] = {name: {} for name in models}
    runs: dict[str, dict[str, Logits]] = {"torch": {}, "ONNX Runtime": {}, "OpenVINO": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            path = _export(model, Path(folder) / name.replace(" ", "-"))
            rows[name]["bytes"] = sum(
                file.stat().st_size for file in path.parent.glob("model.onnx*")
            )
            runs["torch"][name] = _in_torch(model)
            runs["ONNX Runtime"][name] = _in_onnxruntime(path)
            runs["OpenVINO"][name] = _in_openvino(path)
        for name in models:
            rows[name] |= _errors({runtime: found[name] for runtime, found in runs.items()})
        for runtime, found in runs.items():
            for name, speeds in _speeds(found, asked).items():
                rows[name][f"{runtime} speed"] = speeds
    figures = {name: getattr(asked, name) for name in ("hidden", "intermediate", "layers")}
    write(asked.out, "exported", figures | {"tokens": asked.tokens, "rows": rows}, _table(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=15, help="turns of each, at most")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def _llama(asked: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=asked.hidden,
        intermediate_size=asked.intermediate,
        num_hidden_layers=asked.layers,
        num_attention_heads=max(1, asked.hidden // 64),
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def _made(name: str, asked: argparse.Namespace) -> PreTrainedModel:
    scheme, options = VARIANTS[name]
    if scheme == "auto":
        ids = torch.randint(WORDS, (4096,), generator=torch.Generator().manual_seed(0))
        options = {**options, "calibration": ids, "max_length": 64}
    return tnlm.compress(_llama(asked), scheme, progress=False, **options).eval()


def _export(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model as ONNX; return its file, beside which the weights are."""
    ids = torch.arange(24).reshape(2, 12)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = OnnxExporter().export(model, prompt, config=OnnxConfig(dynamic=True))
    made.save_pretrained(folder)
    return folder / "model.onnx"


def _in_torch(model: PreTrainedModel) -> Logits:
    def run(ids: Tensor) -> Any:
        with torch.no_grad():
            return model(ids, attention_mask=torch.ones_like(ids)).logits.numpy()

    return run


def _feed(ids: Tensor) -> dict[str, Any]:
    return {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}


def _in_onnxruntime(path: Path) -> Logits:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)
    return lambda ids: session.run(None, _feed(ids))[0]


def _in_openvino(path: Path) -> Logits:
    core = openvino.Core()
    # On processors with bfloat16 OpenVINO would compute in it.
    wanted = {"INFERENCE_PRECISION_HINT": "f32"}
    wanted["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
    compiled = core.compile_model(core.read_model(str(path)), "CPU", wanted)
    return lambda ids: compiled(_feed(ids))[0]


def _errors(run: Mapping[str, Logits]) -> dict[str, float]:
    ids = torch.arange(17)[None]
    expected = run["torch"](ids)
    return {
        f"{runtime} error": float(np.abs(logits(ids) - expected).max() / np.abs(expected).max())
        for runtime, logits in run.items()
        if runtime != "torch"
    }


def _speeds(found: Mapping[str, Logits], asked: argparse.Namespace) -> dict[str, list[float]]:
    """Return the speed of every variant, relative to dense, for each number of tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in found}
    for count in asked.tokens:
        ids = torch.arange(count)[None] % WORDS
        calls = {name: [partial(logits, ids)] for name, logits in found.items()}
        times = take_turns(calls, asked.repeats)
        for name, seconds in times.items():
            pairs = zip(times["dense"], seconds, strict=True)
            speeds[name].append(round(statistics.median(a / b for a, b in pairs), 3))
    return speeds


def _table(rows: Mapping[str, dict[str, Any]]) -> str:
    head = ["", "megabytes", "torch", "ONNX Runtime", "OpenVINO", "largest error"]
    lines = []
    for name, row in rows.items():
        speeds = [
            " / ".join(f"{speed:.2f}" for speed in row[f"{runtime} speed"]) for runtime in head[2:5]
        ]
        error = max(row["ONNX Runtime error"], row["OpenVINO error"])
        lines.append([name, f"{row['bytes'] / 1e6:.1f}", *speeds, f"{error:.0e}"])
    return table(head, lines)


if __name__ == "__main__":
    main()
