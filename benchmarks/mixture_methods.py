"""Methods for experts on the trained mixture, at equal parameters of the experts; resumable.

    python benchmarks/mixture_methods.py --out docs/benchmarks

``svd-llm`` is low rank of every expert's matrices, ``reap`` drops experts. The others have one
loss-aware budget: ``removal`` drops the experts that harm the loss least; ``low-rank``; ``tucker``
across the experts of a projection; ``stack-tucker``, which chooses between the last two; ``auto``,
which chooses fewer channels as well; and ``removal, then auto``, which first drops a tenth of the
experts. All are calibrated on the training text and measured on held-out documents. Statistics and
finished rows are kept beside the model, in the user's cache.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from mixture_model import trained_mixture
from python_models import STEPS, WINDOW
from timing import table, write
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.evaluation.perplexity import window_losses
from tnlm.studies.journal import Journal

CALIBRATION = {"num_samples": 128, "max_length": WINDOW}
GRADIENTS = 64
"""Windows that gradients are taken of."""

DROPPED, BOTH = 0.9, "removal, then auto"
"""Part of the experts that is left where some are dropped first, and the name of that method."""
REMOVAL = tnlm.scheme("reap", metric="removal", allocation="loss")
METHODS: dict[str, Any] = {
    "svd-llm": tnlm.scheme("svd-llm"),
    "reap": tnlm.scheme("reap"),
    "removal": REMOVAL,
    "low-rank": tnlm.scheme("auto", formats=("low-rank",)),
    "tucker": tnlm.scheme("stack-tucker", formats=("expert-tucker",)),
    "stack-tucker": tnlm.scheme("stack-tucker"),
    "auto": tnlm.scheme("auto"),
    BOTH: tnlm.scheme("auto"),
}
Row = dict[str, Any]


def main() -> None:
    """Run what is missing, then write the table."""
    asked = _arguments()
    _, tokenizer, folder = trained_mixture(asked.steps)
    about = {"windows": asked.windows, **CALIBRATION, "gradients": GRADIENTS}
    journal = Journal(folder / "methods.jsonl", about)
    wanted = [("dense", 1.0), *((s, k) for k in asked.keep_targets for s in asked.scheme)]
    for scheme, keep in wanted:
        if f"{scheme} {keep}" not in journal.rows:
            print(f"{scheme} at {keep:g} ...", file=sys.stderr, flush=True)
            found = measure(folder, tokenizer, scheme, keep, asked.windows)
            journal.add(f"{scheme} {keep}", {"scheme": scheme, "asked": keep, **found})
    rows = [journal.rows[f"{scheme} {keep}"] for scheme, keep in wanted]
    write(asked.out, "mixture_methods", {"rows": rows}, as_text(rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--keep-targets", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--windows", type=int, default=128, help="of 256 tokens, to measure on")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def measure(folder: Path, tokenizer: Any, method: str, keep: float, windows: int) -> Row:
    """Compress the experts, and return the loss of every held-out window."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    row: Row = {"keep_targets": 1.0, "keep_macs": 1.0}
    data = {"calibration": folder / "training.jsonl", "tokenizer": tokenizer}
    data["cache_dir"] = folder / "statistics"
    for scheme, part in steps(method, keep):
        gradients = {"gradient_samples": GRADIENTS} if "gradients" in scheme.needs else {}
        options = {**data, **CALIBRATION, **gradients, "targets": ["experts"]}
        asked = part / row["keep_targets"]
        tnlm.compress(model, scheme, keep_targets=asked, progress=False, **options)
        plan = tnlm.report(model).plan
        row["keep_targets"] *= plan.targets_after.params / plan.targets_before.params
        row["keep_macs"] *= plan.targets_after.macs / plan.targets_before.macs
    row["parameters"] = model.num_parameters()
    text = folder / "held_out.jsonl"
    _, losses = window_losses(model, text, tokenizer, window=WINDOW, windows=windows)
    return row | {"losses": [loss / (WINDOW - 1) for loss in losses]}


def steps(method: str, keep: float) -> list[tuple[Any, float]]:
    """Return the schemes of a method, each with the part of the experts that is left after it."""
    if method == "dense":
        return []
    first = [(REMOVAL, DROPPED)] if method == BOTH else []
    return [*first, (METHODS[method], keep)]


def as_text(rows: list[Row]) -> str:
    """Return the table: perplexities, and ratios to dense with their paired standard errors."""
    dense = rows[0]
    head = ["scheme", "experts' parameters", "multiply-adds", "parameters", "perplexity"]
    head += ["ratio to dense"]
    lines = []
    for row in rows:
        mean, error = paired(row["losses"], dense["losses"])
        lines.append(
            [
                row["scheme"],
                *(f"{row.get(key, 1.0):.3f}" for key in ("keep_targets", "keep_macs")),
                f"{row['parameters']:,}",
                f"{math.exp(statistics.fmean(row['losses'])):.2f}",
                f"{math.exp(mean):.4f} ± {math.exp(mean) * error:.4f}",
            ]
        )
    return table(head, lines)


def paired(losses: list[float], others: list[float]) -> tuple[float, float]:
    """Return the mean difference of two lists, and its standard error.

    Example:
        >>> paired([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
        (1.0, 0.5773502691896258)
    """
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    return statistics.fmean(differences), spread / math.sqrt(len(differences))


if __name__ == "__main__":
    main()
