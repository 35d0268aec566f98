"""Options that several commands share, each with its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

FILE: Any = {"exists": True, "dir_okay": False}
FOLDER: Any = {"exists": True, "file_okay": False}
"""Of options that name what is to be read: it is looked for before any work."""

Model = Annotated[str, typer.Argument(help="A model directory, a .gguf file, or a hub id.")]
SchemeName = Annotated[str, typer.Option("--scheme", "-s", help="A name from `tnlm schemes`.")]
Terms = Annotated[int | None, typer.Option(help="Kronecker products to sum.")]
Rank = Annotated[int | None, typer.Option(help="Rank of every matrix.")]
Ranks = Annotated[str | None, typer.Option(help="Ranks of bonds or modes: 8, or 8,8,16.")]
OutSplit = Annotated[str | None, typer.Option(help="How outputs split into modes: 48,32.")]
InSplit = Annotated[str | None, typer.Option(help="How inputs split into modes: 24,24.")]
Width = Annotated[int | None, typer.Option(help="Feed-forward channels of a block that stay.")]
Gauge = Annotated[
    bool | None, typer.Option("--gauge/--no-gauge", help="Store an identity block implicitly.")
]
Ridge = Annotated[float | None, typer.Option(help="Shrinks the factors of tfwsvd.")]
Sweeps = Annotated[int | None, typer.Option(help="Most passes of tfwsvd over its factors.")]
Keep = Annotated[
    float | None, typer.Option(help="Fraction of the whole model's parameters to keep.")
]
KeepTargets = Annotated[
    float | None, typer.Option(help="Fraction of the targets' parameters to keep.")
]
Tolerance = Annotated[float | None, typer.Option(help="Relative error allowed to a matrix.")]
MaxMacs = Annotated[
    float, typer.Option(help="Multiply-adds of a matrix, at most this multiple of dense.")
]
MetricName = Annotated[
    str | None,
    typer.Option("--metric", help="How errors are measured: identity, input, two-sided, ..."),
]
AllocationName = Annotated[
    str | None,
    typer.Option("--allocation", help="uniform, loss, energy, last or truncation."),
]
Cascade = Annotated[str | None, typer.Option(help="none, sequential or anchored.")]
Damping = Annotated[
    float | None, typer.Option(help="Share of a moment replaced by its mean diagonal.")
]
Refine = Annotated[int, typer.Option(help="Tokens on which every block is tuned after fitting.")]
Share = Annotated[int | None, typer.Option(help="Blocks that share an input factor, low rank.")]
Unit = Annotated[str, typer.Option(help="What keep counts: params, bytes or macs.")]
Blocks = Annotated[int | None, typer.Option(help="Last blocks cut, for --allocation last.")]
GradientSamples = Annotated[
    int | None, typer.Option(help="Windows used for gradients; 16 if not given.")
]
Calibration = Annotated[
    Path | None,
    typer.Option(help="Text or JSONL file, for schemes that look at data.", **FILE),
]
NumSamples = Annotated[
    int | None, typer.Option(help="Windows of calibration text; 64 if not given.")
]
MaxLength = Annotated[int, typer.Option(help="Tokens in a window.")]
MaxLengthAsked = Annotated[int | None, typer.Option(help="Tokens in a window; 512 if not given.")]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos", help="Begin windows with BOS; as the tokenizer does, if not given."
    ),
]
CacheDir = Annotated[Path | None, typer.Option(help="Keeps calibration statistics between runs.")]
Targets = Annotated[
    str | None, typer.Option(help="all-linear, embeddings, or a regular expression of names.")
]
Ignore = Annotated[str | None, typer.Option(help="Left alone: a regular expression of names.")]
Seed = Annotated[int, typer.Option(help="Draws the calibration windows.")]
SeedAsked = Annotated[
    int | None, typer.Option(help="Draws windows and all else that is random; 0 if not given.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what OUT holds.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Recover = Annotated[
    str | None,
    typer.Option(
        help="Training in the end: lora, distill, finetune, mixed-rank, mixed-rank-frozen, none."
    ),
]
RecoverTokens = Annotated[int | None, typer.Option(help="Tokens that it sees.")]
Training = Annotated[
    Path | None,
    typer.Option(help="Text or JSONL to train on; the calibration data if not given.", **FILE),
]
