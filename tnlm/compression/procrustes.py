"""Finds the rotation of the residual stream under which a structure fits a model best."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.compression.choices import gather_choices
from tnlm.compression.earlier import asked_of, check_alone
from tnlm.compression.evidence import Evidence
from tnlm.compression.gatherers.base import Found
from tnlm.compression.job import Job, prepare
from tnlm.compression.pieces import Piece, alternate, pull_of
from tnlm.compression.pipeline import resume, settle
from tnlm.compression.request import Request, request_of
from tnlm.compression.rotate import rotate
from tnlm.decompositions import get_format
from tnlm.decompositions.base import from_dict
from tnlm.errors import OptionError
from tnlm.metrics.sides import turned
from tnlm.plans.plan import Plan
from tnlm.schemes.base import Scheme
from tnlm.targets.base import Member, Selector
from tnlm.targets.checks import check_model
from tnlm.targets.residual import ResidualStream, residual_stream

logger = logging.getLogger("tnlm")

ROUNDS = 4
"""Rounds of the structure given the rotation, then the rotation given the structure."""
METRICS = ("identity", "input", "two-sided")
"""Metrics whose statistics can be rotated."""


def procrustes_rotation(
    model: PreTrainedModel,
    scheme: str | Scheme | Plan = "kron",
    *,
    rounds: int = ROUNDS,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    progress: bool = True,
    **choices: Any,
) -> Tensor:
    """Find the rotation of a model's residual stream under which a scheme's structure fits best.

    The model is left unchanged; :func:`rotate` rotates it (a model with a tied head by
    ``untie=True``), and :func:`compress` follows with the same arguments. Only linear layers that
    read or write the stream and whose factors split its side are searched: neither embeddings nor
    rounding are. The search starts at the principal directions of the energy of all matrices
    under the metric, in order. There it plans the scheme, and alternates between the rotation given
    all factors (a weighted Procrustes problem) and least squares of the factors given the rotation.
    Neither raises the total error. All matrices of the stream and their metrics are held in memory,
    beside a copy of the model.

    Args:
        model: as for :func:`rotate`.
        scheme: as for :func:`compress`, also a plan; the metric must be ``"identity"``, ``"input"``
            or ``"two-sided"``.
        rounds: most alternations; the last is the first that gains less than 1 %.
        targets: as for :func:`compress`.
        ignore: as for :func:`compress`.
        progress: show progress bars.
        **choices: further arguments of :func:`compress`, such as ``keep_targets``, ``terms``,
            ``calibration`` and ``tokenizer``. ``precision``, ``cascade``, ``refine`` and
            ``recover`` belong to the later :func:`compress`, and do not influence the search.

    Returns:
        Q, ``(width, width)``, orthogonal, float64.

    Raises:
        OptionError: if the metric cannot be rotated, or no linear layer is searched: low rank does
            not depend on the basis, nor does any structure that keeps the stream's side whole.
        TnlmError: as :func:`compress`; ModelError as :func:`rotate`.

    Source: ProcrustesGPT (arXiv 2506.02818), with one rotation for all sub-layers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> import tnlm
        >>> model = LlamaForCausalLM(tiny)
        >>> sums = {"targets": ["q_proj", "up_proj"], "terms": 3, "in_split": [4, 4]}
        >>> found = procrustes_rotation(model, "kron", **sums, progress=False)
        >>> model = tnlm.compress(tnlm.rotate(model, found), "kron", **sums, progress=False)
    """
    check_model(model)
    if isinstance(scheme, Plan):
        check_alone(choices, targets, ignore)
        asked = asked_of(scheme, choices)
    else:
        asked = gather_choices(scheme, choices)
    request = request_of(asked)
    _check(request, rounds)
    stream = residual_stream(model)
    with torch.inference_mode(False), torch.no_grad():
        copied = rotate(copy.deepcopy(model), torch.eye(stream.width), untie=True)
        decided: Plan | None = None
        if isinstance(scheme, Plan):
            decided, job = resume(copied, scheme, choices, progress)
        else:
            job = prepare(copied, request, targets, ignore, asked.calibration, progress)
        start = principal(copied, job, stream)
        pieces = _turned_pieces(copied, job, decided, stream, start, progress)
        found, errors = alternate(pieces, rounds)
    logger.info("squared error by rounds: %s", ", ".join(f"{error:.6g}" for error in errors))
    return start @ found


def _turned_pieces(
    model: PreTrainedModel,
    job: Job,
    decided: Plan | None,
    stream: ResidualStream,
    start: Tensor,
    progress: bool,
) -> list[Piece]:
    """Rotate a model, plan the job there if no plan was given, and return its pieces."""
    rotate(model, start)
    job = replace(job, evidence=rotated(job.evidence, stream, start))
    if decided is None:
        decided = settle(model, job, predict=False, progress=progress)
    pieces = list(pieces_of(model, job, decided, stream))
    if not pieces:
        raise OptionError(
            "no linear layer that reads or writes the residual stream takes factors that split the "
            "stream's side, which are all that is searched (embeddings and rounding are not); low "
            "rank keeps that side whole; give in_split= or out_split=, or another size",
            argument=("in_split", "out_split"),
        )
    return pieces


def rotated(evidence: Evidence, stream: ResidualStream, rotation: Tensor) -> Evidence:
    """Return the evidence of a model after its stream is rotated."""
    sources = {
        name: replace(found, read=partial(_read, found, stream, rotation))
        for name, found in evidence.sources.items()
    }
    return replace(evidence, sources=sources, _latest=None)


def _read(
    found: Found, stream: ResidualStream, rotation: Tensor, target: Member, name: str
) -> Tensor:
    values = found.read(target, name)
    reads, writes = target.module in stream.readers, target.module in stream.writers
    if (name == "moment" and reads) or (name == "gradient" and writes and values.dim() == 2):
        return turned(values.double(), rotation.to(values.device))
    return values


def _check(request: Request, rounds: int) -> None:
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 0:
        raise OptionError(f"rounds={rounds!r}; allowed: a whole number >= 0", argument="rounds")
    if request.measure.name not in METRICS:
        raise OptionError(
            f"metric={request.measure.name!r} cannot be rotated; allowed: {', '.join(METRICS)}",
            argument="metric",
        )


def principal(model: PreTrainedModel, job: Job, stream: ResidualStream) -> Tensor:
    """Return the principal directions of the energy of all matrices that touch the stream."""
    total = torch.zeros(stream.width, stream.width, dtype=torch.float64)
    for target in _touching(job, stream):
        weight, metric = target.weight(model).double(), job.evidence.metric(target)
        energy = pull_of(weight, weight, metric, reads=target.module in stream.readers)
        total += job.evidence.importance(target) * energy.to(total.device)
    ascending: Tensor = torch.linalg.eigh((total + total.T) / 2.0)[1]
    return ascending.flip(1)


def pieces_of(
    model: PreTrainedModel, job: Job, decided: Plan, stream: ResidualStream
) -> Iterator[Piece]:
    """Yield the fits of all matrices whose structure splits the side at the stream."""
    layers = {layer.name: layer for layer in decided.layers}
    for target in _touching(job, stream):
        layer = layers.get(target.name)
        if layer is None or layer.format is None or layer.kind != "linear":
            continue
        structure = get_format(layer.format)
        spec = from_dict(structure.spec, layer.spec)
        network = structure.network(target.shape, spec)
        reads = target.module in stream.readers
        modes = network.inp if reads else network.out
        if sum(network.sizes[mode] > 1 for mode in modes) < 2:
            continue
        weight, metric = target.weight(model).double(), job.evidence.metric(target)
        yield Piece(
            stream.readers.get(target.module, target.module),
            reads,
            weight,
            metric,
            network,
            structure.fit(weight, metric, spec),
            job.evidence.importance(target),
        )


def _touching(job: Job, stream: ResidualStream) -> list[Member]:
    """Return the targets that read or write the stream."""
    known = {*stream.readers, *stream.writers}
    return [target for target in job.selection.targets if target.module in known]
