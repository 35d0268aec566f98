"""What a model loses without each tenth of its singular values, and whether errors predict it.

    python benchmarks/groups.py MODEL --text test.txt --calibration train.txt [--out DIR]

The singular values of all linear matrices are cut into equal groups; perplexity is measured without
each of them. ``fwsvd`` weights columns by their Fisher information on the calibration text first.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from timing import table, write

import tnlm
from tnlm.checkpoint.dense_models import load_model
from tnlm.studies.analysis import GroupTruncation
from tnlm.studies.analysis.truncation import WEIGHTINGS


def main() -> None:
    """Measure both weightings, then write the table."""
    asked = _arguments()
    model, tokenizer = load_model(asked.model)
    found = [
        tnlm.truncate_groups(
            model,
            asked.text,
            tokenizer=tokenizer,
            weighting=weighting,
            calibration=None if weighting == "svd" else asked.calibration,
            window=asked.window,
            windows=asked.windows,
            max_length=asked.window,
        )
        for weighting in WEIGHTINGS
    ]
    figures = {"window": asked.window, "windows": asked.windows}
    weightings = {truncation.weighting: asdict(truncation) for truncation in found}
    write(asked.out, "groups", {**figures, "weightings": weightings}, as_text(found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="perplexity is measured on it")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--out", type=Path, help="folder for the JSON and Markdown files")
    return parser.parse_args()


def as_text(found: Sequence[GroupTruncation]) -> str:
    """Return the table: of every weighting, the error that it makes small, and perplexity."""
    head = ["group"]
    for truncation in found:
        head += [f"{truncation.weighting}: error", "perplexity"]
    lines = [["none", *(cell for each in found for cell in ("0", f"{each.dense:,.1f}"))]]
    for rows in zip(*(truncation.rows for truncation in found), strict=True):
        cells = [(f"{row.weighted_error:.3f}", f"{row.value:,.1f}") for row in rows]
        lines.append([str(rows[0].group), *(cell for pair in cells for cell in pair)])
    said = [f"{each.weighting} {_shown(each)}" for each in found]
    return (
        f"{table(head, lines)}\n\nRank correlation of error and loss over the groups: "
        f"{', '.join(said)}."
    )


def _shown(truncation: GroupTruncation) -> str:
    found = truncation.weighted_spearman
    return truncation.note if found is None else f"{found:.3f}"


if __name__ == "__main__":
    main()
