"""save: writes a compressed model to a directory, completely or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from tnlm.checkpoint.exchange import replace_directory
from tnlm.checkpoint.reports import known_report
from tnlm.checkpoint.savable import check_savable
from tnlm.checkpoint.sums import REPORT_FILE, record_sums
from tnlm.checkpoint.transformers_plugin import description
from tnlm.errors import ModelError
from tnlm.utils.claim import temporary_folder


def save(
    model: PreTrainedModel,
    directory: str | Path,
    *,
    tokenizer: Any = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> Path:
    """Save a compressed model as a Hugging Face directory that fails loudly without tnlm.

    The files are first written aside and then moved into place. A failure leaves the old files, and
    the next save or load of the directory cleans up after a killed process. The directory may be a
    mount point, or a link to a directory. ``model.save_pretrained`` writes the same files except
    the report, without these guarantees.

    Args:
        model: a model compressed by tnlm.
        directory: new or empty, unless ``overwrite``.
        tokenizer: saved with the model, if given.
        overwrite: replace the contents of the directory.
        **kwargs: passed to ``save_pretrained``, e.g. ``max_shard_size``; a process with
            ``is_main_process=False`` leaves the directory alone.

    Returns:
        The directory.

    Raises:
        ModelError: if the model is not compressed, or could not be loaded again: it has values
            that are not finite, changed modules, adapters or another library's quantization.
        CheckpointError: if the directory is not empty, cannot be written, or is being written by
            another process.
    """
    said = description(model)
    if said is None:
        raise ModelError("the model is not compressed by tnlm; use model.save_pretrained")
    check_savable(model, said)
    target = Path(directory)
    if not kwargs.get("is_main_process", True):  # another process writes it
        with temporary_folder() as nowhere:
            model.save_pretrained(nowhere, **kwargs)
        return target

    def write(new: Path) -> None:
        model.save_pretrained(new, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        report = known_report(model)
        if report is not None:
            (new / REPORT_FILE).write_text(report.to_json())
        record_sums(new)

    replace_directory(target, write, overwrite=overwrite)
    return target
