"""Options that several commands share, with their help texts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FILE: Any = {"exists": True, "dir_okay": False}
FOLDER: Any = {"exists": True, "file_okay": False}
"""For options that name an input: check that it exists before any work."""


def data_file(text: str) -> Path | str:
    """Return the file that an option names, or the word ``self``.

    Example:
        >>> data_file("self")
        'self'
    """
    path = Path(text)
    if text == "self":
        return text
    if not path.exists():
        raise typer.BadParameter(f"File {text!r} does not exist.")
    if path.is_dir():
        raise typer.BadParameter(f"File {text!r} is a directory.")
    return path


DATA: Any = {"parser": data_file, "metavar": "FILE"}
"""For options that name data, which the model may write itself."""

Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file, or a hub id.")]
SchemeName = Annotated[str, typer.Option("--scheme", "-s", help="A name from `tnlm schemes`.")]
Terms = Annotated[int | None, typer.Option(help="Kronecker products to sum.")]
Rank = Annotated[int | None, typer.Option(help="Rank of every matrix.")]
Ranks = Annotated[str | None, typer.Option(help="Ranks of the bonds or modes: 8, or 8,8,16.")]
OutSplit = Annotated[str | None, typer.Option(help="Sizes of the output modes: 48,32.")]
InSplit = Annotated[str | None, typer.Option(help="Sizes of the input modes: 24,24.")]
Width = Annotated[int | None, typer.Option(help="Feed-forward channels to keep per block.")]
Gauge = Annotated[
    bool | None, typer.Option("--gauge/--no-gauge", help="Store an identity block implicitly.")
]
Ridge = Annotated[float | None, typer.Option(help="Penalty that shrinks the factors (tfwsvd).")]
Sweeps = Annotated[int | None, typer.Option(help="Maximum passes over the factors (tfwsvd).")]
Keep = Annotated[
    float | None, typer.Option(help="Fraction of the whole model's parameters to keep.")
]
KeepTargets = Annotated[
    float | None, typer.Option(help="Fraction of the targets' parameters to keep.")
]
Tolerance = Annotated[float | None, typer.Option(help="Relative error allowed per matrix.")]
MaxMacs = Annotated[
    float, typer.Option(help="Maximum multiply-adds per matrix, as a multiple of dense.")
]
MetricName = Annotated[
    str | None,
    typer.Option("--metric", help="How errors are measured: identity, input, two-sided, ..."),
]
AllocationName = Annotated[
    str | None,
    typer.Option("--allocation", help="uniform, even, loss, energy, last or truncation."),
]
Cascade = Annotated[str | None, typer.Option(help="none, sequential or anchored.")]
Damping = Annotated[
    float | None, typer.Option(help="Fraction of a moment replaced by its mean diagonal.")
]
Refine = Annotated[int, typer.Option(help="Tokens to tune each block on after fitting.")]
Share = Annotated[int | None, typer.Option(help="Blocks that share an input factor (low rank).")]
Unit = Annotated[str, typer.Option(help="Unit of the budget: params, bytes or macs.")]
Blocks = Annotated[
    int | None, typer.Option(help="Number of last blocks to compress, for --allocation last.")
]
GradientSamples = Annotated[
    int | None, typer.Option(help="Windows used for gradients; 16 by default.")
]
Calibration = Annotated[
    Any,
    typer.Option(
        help="Calibration data: a text, JSONL or parquet file, or self for text that the model "
        "writes.",
        **DATA,
    ),
]
NumSamples = Annotated[int | None, typer.Option(help="Calibration windows; 64 by default.")]
MaxLength = Annotated[int, typer.Option(help="Tokens per window.")]
MaxLengthAsked = Annotated[int | None, typer.Option(help="Tokens per window; 512 by default.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Start each window with BOS; by default, as the tokenizer does."
    ),
]
CacheDir = Annotated[Path | None, typer.Option(help="Keeps calibration statistics between runs.")]
Targets = Annotated[
    str | None,
    typer.Option(help="Matrices to compress: all-linear, embeddings, or a regex for names."),
]
Ignore = Annotated[str | None, typer.Option(help="Matrices to leave alone: a regex for names.")]
Seed = Annotated[int, typer.Option(help="Seed for the calibration windows.")]
SeedAsked = Annotated[
    int | None, typer.Option(help="Seed for the windows and other random choices; 0 by default.")
]
Dtype = Annotated[str, typer.Option(help="Data type: auto, float32, bfloat16, float16 or float64.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the contents of OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Recover = Annotated[
    str | None,
    typer.Option(
        help="Training after fitting: lora, distill, finetune, mixed-rank, mixed-rank-frozen, none."
    ),
]
RecoverTokens = Annotated[int | None, typer.Option(help="Tokens to train on.")]
Training = Annotated[
    Path | None,
    typer.Option(help="Training data; the calibration data by default.", **FILE),
]
