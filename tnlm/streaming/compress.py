"""compress_files: from a model's directory to a compressed one, block by block."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from tnlm.checkpoint.dense_models import load_tokenizer
from tnlm.checkpoint.describing import saved_report
from tnlm.checkpoint.disk_weights import DiskWeights, read_when_called
from tnlm.checkpoint.exchange import check_writable, replace_directory
from tnlm.checkpoint.folder import INDEX
from tnlm.checkpoint.skeleton import open_skeleton
from tnlm.checkpoint.sums import REPORT_FILE, record_sums
from tnlm.checkpoint.transformers_plugin import attach
from tnlm.checkpoint.writing import save_description
from tnlm.compression.choices import Asked, Calibration, gather_choices
from tnlm.compression.earlier import asked_of, check_alone, grid_of, kinds_of, matched, names_of
from tnlm.compression.fitting import Fitting
from tnlm.compression.job import Job, prepare
from tnlm.compression.pipeline import fit_all, report_of, settle
from tnlm.compression.request import Request, request_of
from tnlm.errors import CheckpointError, ProcessError, TnlmError
from tnlm.layers.swap import Shelf
from tnlm.parallel.choose import workers_of
from tnlm.parallel.workers import ALONE, Workers
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report, with_errors
from tnlm.precision.grid import Precision
from tnlm.schemes.base import Scheme
from tnlm.streaming.blocks import block_names
from tnlm.streaming.pieces import Pieces
from tnlm.streaming.recipe import recipe
from tnlm.streaming.resources import Resources, check_resources, needed
from tnlm.streaming.rules import check_request, check_source
from tnlm.streaming.sharing import check_shared, fit_share, share_of
from tnlm.streaming.size import bytes_of
from tnlm.streaming.work import PLAN, STATISTICS, Work
from tnlm.targets.base import Selector
from tnlm.targets.stacks import tie
from tnlm.utils.device import device_of
from tnlm.utils.files import write_file


def compress_files(
    source: str | Path,
    out: str | Path,
    scheme: str | Scheme | Plan,
    *,
    memory: int | float | str | None = None,
    scratch: str | Path | None = None,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    overwrite: bool = False,
    workers: Workers | Executor | str | None = None,
    progress: bool = True,
    **choices: Any,
) -> Report:
    """Compress a model's directory into another, with one block of it in memory at a time.

    The result is what :func:`tnlm.compress` and :func:`tnlm.save` give for the loaded model, with
    the same factors, in one file for each block.

    Args:
        source: directory of a dense model, with safetensors files.
        out: new or empty, unless ``overwrite``.
        scheme: a name from ``tnlm.list_schemes()``, a scheme, or a plan from :func:`tnlm.plan`.
        memory: the most memory to hold, such as ``"6GB"``; a run that needs more is refused.
        scratch: folder for temporary files; by default beside ``out``.
        targets: the matrices to compress, as in :func:`tnlm.compress`.
        ignore: matrices to leave alone.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's.
        device: where walks and fits are computed, such as ``"cuda:0"``; one block, or one matrix,
            is moved there at a time. None for the CPU.
        overwrite: replace the contents of ``out``.
        workers: as in :func:`tnlm.compress`; each process writes the blocks that it fits.
        progress: show progress bars.
        **choices: as in :func:`tnlm.compress`, except what trains the whole model; without a
            tokenizer, that of ``source`` is used.

    Returns:
        The report, which is also written to ``out``.

    Raises:
        CapacityError: if the run needs more than ``memory``, or more disk than is free.
        TnlmError: other subclasses; ``out`` is unchanged.

    Example:
        >>> compress_files("no-such-model", "out", "svd")
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: no-such-model has no config.json; ...
    """
    folder, target = check_source(source), Path(out)
    if "calibration" in choices and choices.get("tokenizer") is None:
        choices["tokenizer"] = load_tokenizer(folder)
    earlier = scheme if isinstance(scheme, Plan) else None
    if isinstance(scheme, Plan):
        check_alone(choices, targets, ignore)
        asked, targets = asked_of(scheme, choices), names_of(scheme)
    else:
        asked = gather_choices(scheme, choices)
    request = request_of(asked)
    check_request(request, asked)
    most = None if memory is None else bytes_of(memory, "memory")
    place = device_of(device)
    check_writable(target, overwrite=overwrite)
    with torch.inference_mode(False), workers_of(workers) as team:
        check_shared(request, team)
        with _work(target, scratch, team) as work:
            run = _Run(folder, request, asked, work, dtype, place, progress, team)
            run.check(targets, ignore, most)
            found = run.recipe(targets, ignore) | {"plan": earlier and earlier.to_json()}
            team.check_same(**found)
            if team.rank == 0:
                work.agree(found)
            return run.write(targets, ignore, target, overwrite, earlier, grid_of(choices))


@contextmanager
def _work(out: Path, scratch: str | Path | None, workers: Workers) -> Iterator[Work]:
    """Yield the folder of pieces of an output, and keep it if another run can go on with it."""
    place = None if scratch is None else Path(scratch)
    first = workers.rank == 0
    made = Work(out, place) if first else None
    workers.gather(None)  # until the first process has made the folder
    work = made or Work(out, place, holds=False)
    keep = False
    try:
        yield work
    except BaseException as error:
        keep = not isinstance(error, TnlmError) or isinstance(error, CheckpointError | ProcessError)
        raise
    finally:
        work.close(keep=keep)


def predict_resources(
    source: str | Path,
    scheme: str | Scheme,
    *,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    dtype: str | torch.dtype = "auto",
    **choices: Any,
) -> Resources:
    """Return the memory and disk that :func:`compress_files` would need, without running it.

    The arguments are those of :func:`compress_files`.
    """
    folder = check_source(source)
    asked = gather_choices(scheme, choices)
    request = request_of(asked)
    check_request(request, asked)
    model, _ = open_skeleton(folder, dtype)
    return needed(model, block_names(model), request, asked, targets, ignore)


class _Run:
    """One run, from files to files."""

    def __init__(
        self,
        source: Path,
        request: Request,
        asked: Asked,
        work: Work,
        dtype: str | torch.dtype,
        device: torch.device,
        progress: bool,
        workers: Workers,
    ) -> None:
        self._workers = workers
        progress = progress and workers.rank == 0
        self._source, self._request, self._asked = source, request, asked
        self._work, self._progress = work.folder, progress
        self._model, places = open_skeleton(source, dtype, device)
        self._files = {place.file for place in places.values()}
        self._blocks = block_names(self._model)
        weights = DiskWeights(self._model, places, self._work)
        read_when_called(self._model, weights, self._blocks)

    def recipe(self, targets: Selector | None, ignore: Selector | None) -> dict[str, Any]:
        """Return what the result depends on."""
        return recipe(self._model, self._files, self._request, self._asked, targets, ignore)

    def check(self, targets: Selector | None, ignore: Selector | None, memory: int | None) -> None:
        """Raise `CapacityError` if the run needs more memory or disk than there is."""
        found = needed(self._model, self._blocks, self._request, self._asked, targets, ignore)
        check_resources(found, memory, self._work)

    def write(
        self,
        targets: Selector | None,
        ignore: Selector | None,
        out: Path,
        overwrite: bool,
        earlier: Plan | None,
        grid: Precision | None,
    ) -> Report:
        """Plan, fit and write, and return the report."""
        model, progress = self._model, self._progress
        data, workers, kinds = self._data(), self._workers, kinds_of(earlier) if earlier else None
        job = prepare(model, self._request, targets, ignore, data, progress, workers, kinds)
        decided = self._decide(job) if earlier is None else matched(model, job, earlier, grid)
        start = time.perf_counter()
        fitting, pieces = self._fit(job, decided)
        if workers.rank > 0:
            workers.gather(None)  # until the first process has written
            return saved_report(out)
        job.seconds["fit"] = time.perf_counter() - start - job.seconds.get("refine", 0.0)
        report = self._finish(job, decided, fitting, pieces)

        def fill(new: Path) -> None:
            _assemble(model, pieces.files, new)
            tokenizer = load_tokenizer(self._source)
            if tokenizer is not None:
                tokenizer.save_pretrained(new)
            (new / REPORT_FILE).write_text(report.to_json())
            record_sums(new)

        replace_directory(out, fill, overwrite=overwrite)
        workers.gather(None)
        return report

    def _data(self) -> Calibration:
        """Return the data, with statistics kept among the pieces if nowhere else."""
        data = self._asked.calibration
        if not self._request.measures or data.cache_dir is not None:
            return data
        return replace(data, cache_dir=self._work / STATISTICS)

    def _decide(self, job: Job) -> Plan:
        """Return the plan of an earlier run, or make one and keep it."""
        path = self._work / PLAN
        if not all(self._workers.gather(path.exists())):
            decided = settle(self._model, job, predict=False, progress=self._progress)
            if self._workers.rank == 0:
                write_file(path, decided.to_json())
            self._workers.gather(None)
        job.seconds.setdefault("plan", 0.0)
        return Plan.load(path)

    def _fit(self, job: Job, decided: Plan) -> tuple[Fitting, Pieces]:
        """Fit every matrix, and write every block; with several processes, each writes a share."""
        shelf, workers = Shelf(self._work), self._workers
        shared = workers.size > 1
        alone = replace(job, workers=ALONE) if shared else job
        fitting = Fitting(self._model, alone, decided, shelf)
        blocks, units = share_of(fitting.units, self._blocks, workers)
        pieces = Pieces(self._model, self._blocks, job, fitting, shelf, self._work, blocks)
        if job.request.cascade == "none":  # which needs the dense blocks, and fits them again
            pieces.restore()
        if shared:
            fit_share(fitting, pieces, units, workers, "fitting" if self._progress else None)
        else:
            fit_all(self._model, job, fitting, self._progress, pieces.take)
        job.evidence.forget()
        return fitting, pieces

    def _finish(self, job: Job, decided: Plan, fitting: Fitting, pieces: Pieces) -> Report:
        """Write what is outside the blocks, describe the model, and return the report."""
        config = pieces.finish()
        config.scheme, config.options = decided.scheme, dict(decided.request)
        tie(self._model, fitting.ties)
        attach(self._model, config)
        return report_of(job, with_errors(decided, fitting.reported))


def _assemble(model: PreTrainedModel, files: Mapping[Path, Mapping[str, int]], new: Path) -> None:
    """Put the files of all pieces into a directory, with their index and the config."""
    weights: dict[str, str] = {}
    for number, (path, sizes) in enumerate(sorted(files.items()), start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _link(path, new / name)
        weights.update(dict.fromkeys(sizes, name))
    total = sum(size for sizes in files.values() for size in sizes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (new / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    save_description(model, new)


def _link(path: Path, new: Path) -> None:
    """Give a file a second name, or copy it where that is on another disk."""
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)
