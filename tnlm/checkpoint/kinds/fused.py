"""Several matrices side by side in one module, each with its own entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from tnlm.checkpoint.kinds import KINDS
from tnlm.checkpoint.kinds.base import Entry, MatrixKind, Place, plain, trained
from tnlm.errors import CheckpointError
from tnlm.layers.fused import FusedLinear, joined


class Fused(MatrixKind):
    """A list of ``parts``: entries of matrices, each with a ``name``.

    Their rows follow one another, or so many of each in turn as ``runs`` says.
    """

    name = "fused"

    def shape(self, entry: Entry) -> tuple[int, int]:
        """Return the shape of all parts together."""
        parts = entry["parts"]
        shapes = [_kind(part).shape(part) for part in parts]
        widths, names = {columns for _, columns in shapes}, {part.get("name") for part in parts}
        if len(widths) != 1 or len(names) != len(parts):
            raise CheckpointError("its parts must have one width and different names")
        if "runs" in entry:
            _check_runs(entry["runs"], [part["shape"][0] for part in parts])
            _check_runs(entry["runs"], [rows for rows, _ in shapes])
        return sum(rows for rows, _ in shapes), widths.pop()

    def check_part(self, entry: Entry, biased: bool) -> None:
        """Check every part."""
        for part in entry["parts"]:
            _kind(part).check_part(part, biased)

    def build(self, entry: Entry, place: Place) -> nn.Module:
        """Return a `FusedLinear` of the parts."""
        return FusedLinear(
            {part["name"]: _kind(part).build(part, place) for part in entry["parts"]},
            entry.get("runs", ()),
        )

    def dense(self, entry: Entry, module: Any) -> nn.Module:
        """Return one layer with the weights of all parts."""
        parts = [kind.dense(part, inner) for kind, part, inner in _parts(entry, module)]
        return _one(entry, parts, trained(module))

    def small(self, entry: Entry, module: Any) -> nn.Module:
        """Return one layer with the weights of all parts, without dropped channels."""
        parts = [kind.small(part, inner) for kind, part, inner in _parts(entry, module)]
        return _one(entry, parts, trained(module))


def _parts(entry: Entry, module: Any) -> Iterator[tuple[MatrixKind, Entry, nn.Module]]:
    """Yield the kind, the entry and the module of every part."""
    for part in entry["parts"]:
        yield _kind(part), {**part, "conv1d": False}, getattr(module, part["name"])


def _one(entry: Entry, parts: Sequence[Any], learns: bool) -> nn.Module:
    runs = entry.get("runs", ())
    weight = joined([part.weight.detach() for part in parts], runs, 0)
    return plain(entry, weight, _bias(parts, runs), learns)


def _kind(part: Entry) -> MatrixKind:
    kind = KINDS.get(part["kind"])
    if not isinstance(kind, MatrixKind) or not kind.partial:
        raise CheckpointError(f"kind={part['kind']!r} cannot be one of several parts")
    return kind


def _check_runs(runs: Sequence[Any], rows: Sequence[int]) -> None:
    """Raise `CheckpointError` unless all parts have as many runs."""
    whole = len(runs) == len(rows) and all(type(run) is int and run >= 1 for run in runs)
    counts = {divmod(size, run) for size, run in zip(rows, runs, strict=True)} if whole else set()
    if len(counts) != 1 or counts.pop()[1]:
        raise CheckpointError(f"runs={runs!r} do not divide parts of {list(rows)} rows alike")


def _bias(parts: Sequence[Any], runs: Sequence[int]) -> nn.Parameter | None:
    """Return the bias of all parts, zero where one has none."""
    biases = [part.bias for part in parts]
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    whole = [
        part.weight.new_zeros(len(part.weight)) if bias is None else bias.detach()
        for part, bias in zip(parts, biases, strict=True)
    ]
    learns = any(bias.requires_grad for bias in present)
    return nn.Parameter(joined(whole, runs), requires_grad=learns)


KIND = Fused()
