"""What the command line does: load a model, analyze it, write the results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tnlm.analysis.analyze import analyze
from tnlm.analysis.result import Analysis
from tnlm.integrations.models import load_model
from tnlm.saving import check_writable
from tnlm.targets import Selector


def analyze_to(
    source: str | Path,
    out: str | Path,
    *,
    calibration: str | Path | None = None,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    formats: Sequence[str] = (),
    num_samples: int = 16,
    max_length: int = 512,
    seed: int = 0,
    dtype: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Analysis:
    """Analyze a model from its files, and write the results to a directory.

    Args:
        source: a model directory, a ``.gguf`` file or a hub id.
        out: new or empty, unless ``overwrite``; checked before the model is loaded.
        calibration: a text or ``.jsonl`` file.
        targets: see :func:`tnlm.analysis.analyze.analyze`, as for the others.
        ignore: matrices left alone.
        formats: names of formats whose curves are wanted.
        num_samples: windows of calibration data used.
        max_length: tokens in a window.
        seed: draws the windows.
        dtype: of the weights.
        overwrite: replace what the directory holds.
        progress: show progress bars.

    Returns:
        The analysis, which is also in ``out``.

    Raises:
        CheckpointError: if the model cannot be read, or the directory not written.

    Example:
        >>> analyze_to("./no/such/model", "a-new-directory")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: ./no/such/model: no such file or directory; ...
    """
    check_writable(Path(out), overwrite=overwrite)
    model, tokenizer = load_model(source, dtype=dtype)
    found = analyze(
        model,
        calibration,
        tokenizer=tokenizer,
        targets=targets,
        ignore=ignore,
        formats=formats,
        num_samples=num_samples,
        max_length=max_length,
        seed=seed,
        progress=progress,
    )
    found.save(out, overwrite=overwrite)
    return found
