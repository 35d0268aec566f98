"""The interface of formats: what a file must define to add a structure to the library."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from tnlm.errors import OptionError, RankError, did_you_mean
from tnlm.metrics.metric import Metric
from tnlm.tensors.contraction import pairwise
from tnlm.tensors.costs import macs
from tnlm.tensors.network import Factors, Network
from tnlm.utils.ties import EXACT, least

S = TypeVar("S")
KEEPS = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Fractions of a matrix's parameters at which a format's error curve is sampled."""
Shape = tuple[int, int]
QUIET = types.MappingProxyType({"quiet": True})
"""Metadata of spec fields that do not affect the network: files omit them at their defaults."""
FITTING = types.MappingProxyType({**QUIET, "fitting": True})
"""Metadata of such fields that only control elementwise-weighted fits."""
FIXED = types.MappingProxyType({"fixed": True})
"""Metadata of spec fields that the target sets: users cannot."""


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """What one matrix may cost: parameters stored, at most and at least, and multiply-adds."""

    params: float = math.inf
    macs: float = math.inf
    least: int = 0

    def allows(self, network: Network) -> bool:
        """Return whether a network is within all limits."""
        within = self.least <= network.params <= self.params
        return within and macs(network) <= self.macs


class Format(ABC, Generic[S]):
    """A structure that can replace a matrix.

    A format defines its tensor network, fits it, and lists the specs worth trying within a budget.
    Cost, reconstruction, execution, storage and the contract tests follow from these.

    Attributes:
        name: its name for users and in files.
        title: one line for tables.
        spec: a frozen dataclass of plain values (int, bool, tuples of int) that fixes the network.
        metrics: names of the metrics that :meth:`fit` is optimal or exact for.
        kinds: what it can replace: ``"linear"`` weights, ``"embedding"`` tables, or both.
        made_of: kinds of the matrices replaced together, if there are several.
        stacks: whether a stack of matrices can be cut apart after the fit, sharing ``right``.
        copies: how many float64 copies of the matrix a fit holds, at most.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    spec: type[S]
    metrics: ClassVar[frozenset[str]] = frozenset({"identity"})
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    made_of: ClassVar[frozenset[str]] = frozenset()
    stacks: ClassVar[bool] = False
    copies: ClassVar[float] = 8.0

    @abstractmethod
    def network(self, shape: Shape, spec: S) -> Network:
        """Return the network of a spec for an ``(out, in)`` matrix.

        Raises:
            RankError: if the matrix cannot have this spec; the message states what it can have.
        """

    @abstractmethod
    def fit(self, weight: Tensor, metric: Metric, spec: S) -> Factors:
        """Fit the format to ``weight``, and return all full factors, float64."""

    @abstractmethod
    def candidates(self, shape: Shape, options: Mapping[str, Any], ceiling: Ceiling) -> Sequence[S]:
        """Return the largest specs within a budget that match the options.

        Args:
            shape: ``(out, in)``.
            options: values of some fields of the spec.
            ceiling: the most that the matrix may cost.
        """

    @abstractmethod
    def within(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], tolerance: float
    ) -> Sequence[S]:
        """Return small specs whose relative error is at most ``tolerance``."""

    def allows(self, shape: Shape, spec: S, ceiling: Ceiling) -> bool:
        """Return whether a spec is within what the matrix may cost."""
        return ceiling.allows(self.network(shape, spec))

    def errors(self, weight: Tensor, metric: Metric, specs: Sequence[S]) -> list[float]:
        """Return the relative error of each spec; by default, each is fitted and measured."""
        return [
            metric.relative(weight, self.reconstruct(matrix_shape(weight), spec, fitted))
            for spec in specs
            for fitted in [self.fit(weight, metric, spec)]
        ]

    def curve(
        self, weight: Tensor, metric: Metric, options: Mapping[str, Any], macs: float
    ) -> list[tuple[S, float]]:
        """Return specs of increasing size with their relative errors, as choices for allocation.

        Args:
            weight: ``(out, in)``.
            metric: how the error is measured.
            options: values of some fields of the spec.
            macs: the most multiply-adds per token.
        """
        found = []
        for keep in KEEPS:
            ceiling = Ceiling(keep * weight.numel(), macs)
            specs = self.candidates(matrix_shape(weight), options, ceiling)
            if specs:
                errors = self.errors(weight, metric, specs)
                best = least(errors, EXACT)
                found.append((specs[best], errors[best]))
        return found

    def reconstruct(self, shape: Shape, spec: S, factors: Factors) -> Tensor:
        """Return the ``(out, in)`` matrix of full factors."""
        network = self.network(shape, spec)
        table = pairwise(network)([factors[name] for name in network.factors])
        return table.reshape(shape)


def to_dict(spec: Any) -> dict[str, Any]:
    """Return a spec as plain JSON values."""
    usual = {f.name: f.default for f in dataclasses.fields(spec) if "quiet" in f.metadata}
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(spec).items()
        if key not in usual or value != usual[key]
    }


def from_dict(kind: type[S], values: Mapping[str, Any]) -> S:
    """Build a spec from plain values, after checking every name and type.

    Raises:
        OptionError: if a field is unknown, missing or invalid.
    """
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise OptionError(f"unknown option {key!r}{did_you_mean(key, hints)}", argument=hints)
        _check(key, value, hints[key])
    known = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    try:
        return kind(**known)
    except TypeError as error:
        raise OptionError(f"{kind.__name__}: {error}; given: {sorted(values)}") from error


def _check(key: str, value: Any, hint: Any) -> None:
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return
    if bool in allowed:
        good = isinstance(value, bool)
    elif float in allowed:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and 0 <= value < math.inf
    elif int in allowed:
        good = _is_count(value)
    else:
        good = isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_count, value))
    if not good:
        wanted = "true or false" if bool in allowed else "a whole number >= 1"
        wanted = "a finite number >= 0" if float in allowed else wanted
        plain = bool in allowed or float in allowed or int in allowed
        wanted = wanted if plain else f"a list, each entry {wanted}"
        raise OptionError(f"{key}={value!r}; allowed: {wanted}", argument=key)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def matrix_shape(weight: Tensor) -> Shape:
    """Return the shape ``(out, in)`` of a matrix."""
    rows, columns = weight.shape
    return rows, columns


def check_split(name: str, split: Sequence[int], size: int) -> None:
    """Raise `RankError` unless the modes of a split multiply to ``size``."""
    if math.prod(split) != size:
        raise RankError(
            f"{name}={tuple(split)} multiplies to {math.prod(split)}, not to {size}", argument=name
        )


def check_pairs(shape: Shape, out_split: Sequence[int], in_split: Sequence[int]) -> None:
    """Raise `RankError` unless rows and columns each split into two modes."""
    if len(out_split) != 2 or len(in_split) != 2:
        raise RankError(
            f"out_split={out_split}, in_split={in_split}; allowed: two sizes each",
            argument=("out_split", "in_split"),
        )
    check_split("out_split", out_split, shape[0])
    check_split("in_split", in_split, shape[1])


def given_split(
    name: str, options: Mapping[str, Any], size: int, modes: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the split of ``size`` in the options, if any.

    Raises:
        RankError: unless it multiplies to ``size``, and its length is in ``modes``.
    """
    if not options.get(name):
        return None
    split = tuple(options[name])
    check_split(name, split, size)
    if len(split) not in modes:
        allowed = " to ".join(dict.fromkeys((str(modes[0]), str(modes[-1]))))
        raise RankError(f"{name}={split}; allowed: {allowed} sizes", argument=name)
    return split


def as_tensor(weight: Tensor, *splits: Sequence[int]) -> Tensor:
    """Return the weight in float64, reshaped to the modes of its splits."""
    return weight.detach().to(torch.float64).reshape([size for split in splits for size in split])
