"""Exchanges factors with tensorly's own objects: Tucker, CP, TT-matrices and tensor rings."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tnlm.decompositions import get_format
from tnlm.decompositions._tensorly import torch_backend
from tnlm.decompositions.base import Shape
from tnlm.decompositions.cp import CPSpec
from tnlm.decompositions.tensor_ring import TensorRingSpec
from tnlm.decompositions.tensor_train import TensorTrainSpec
from tnlm.decompositions.tucker import TuckerSpec
from tnlm.errors import OptionError, RankError
from tnlm.tensors.network import Factors, Network
from tnlm.utils.checks import is_whole


class Decomposed(NamedTuple):
    """A matrix in a format of tnlm: the format's name, its spec, its network, and full factors."""

    format: str
    spec: Any
    network: Network
    factors: Factors


def from_tensorly(
    tensor: Any, outputs: int | None = None, out_split: Sequence[int] | None = None
) -> Decomposed:
    """Return a decomposition made with tensorly as factors of a format.

    Args:
        tensor: a `TuckerTensor`, `CPTensor` or `TRTensor` of the matrix reshaped to its modes,
            outputs first, or a `TTMatrix`; with torch tensors.
        outputs: how many of the modes are of the outputs, 1 by default; a `TTMatrix` has both in
            every core and takes none.
        out_split: for a `TRTensor` whose modes join outputs and inputs, the outputs in each mode,
            in place of ``outputs``.

    Raises:
        OptionError: if it is none of these, if its factors are not torch tensors, or if an argument
            would have no effect.
        RankError: if the matrix cannot have its ranks in the format; the message says what it can.
            A ring may have no more than TR-SVD makes: the first two ranks multiply to at most the
            size of its first mode.

    Example:
        >>> from tensorly.tt_matrix import TTMatrix
        >>> cores = [torch.randn(1, 2, 3, 2), torch.randn(2, 3, 2, 1)]
        >>> found = from_tensorly(TTMatrix(cores))
        >>> found.format, found.network.shape
        ('tensor-train', (6, 6))
    """
    name = type(tensor).__name__
    if name not in READERS:
        raise OptionError(
            f"{name} is not a tensorly object that tnlm reads; allowed: {', '.join(READERS)}"
        )
    _check_modes(tensor, outputs, out_split)
    parts = [tensor.core] if name == "TuckerTensor" else []
    if name == "CPTensor" and tensor.weights is not None:
        parts = [tensor.weights]
    _check_torch(*parts, *tensor.factors)
    return READERS[name](tensor, 1 if outputs is None else outputs, out_split)


def _check_modes(tensor: Any, outputs: int | None, out_split: Sequence[int] | None) -> None:
    """Raise unless an object takes what says which of its modes are of the outputs."""
    name, modes = type(tensor).__name__, len(tensor.factors)
    if out_split is not None and name != "TRTensor":
        raise OptionError(
            f"out_split={tuple(out_split)}; allowed only for a TRTensor", argument="out_split"
        )
    if outputs is None:
        return
    if out_split is not None or name == "TTMatrix":
        what = f"out_split={out_split!r}" if out_split is not None else "a TTMatrix"
        raise OptionError(
            f"outputs={outputs!r} with {what}, which gives the outputs of every core; leave it out",
            argument="outputs",
        )
    if not is_whole(outputs) or not 1 <= outputs < modes:
        raise RankError(
            f"outputs={outputs!r}; allowed: 1 to {modes - 1} of {modes} modes", argument="outputs"
        )


def _check_torch(*factors: Any) -> None:
    for factor in factors:
        if not isinstance(factor, Tensor):
            raise OptionError(
                f"a factor is of type {type(factor).__name__}; allowed: torch.Tensor; call "
                'tensorly.set_backend("pytorch") and decompose a torch tensor'
            )


def to_tensorly(format_name: str, shape: Shape, spec: Any, factors: Mapping[str, Tensor]) -> Any:
    """Return the factors of a format as an object of tensorly.

    Args:
        format_name: ``"tucker"``, ``"cp"``, ``"tensor-train"``, ``"tensor-ring"``, or
            ``"kronecker"``, which is a TT-matrix of two cores.
        shape: ``(out, in)`` of the matrix.
        spec: the spec of the format.
        factors: all full factors, as a layer's ``factors()`` returns them.

    Returns:
        A `TuckerTensor` or `CPTensor` of the matrix reshaped to its modes, outputs first, a
        `TTMatrix`, or a `TRTensor`, each mode of which joins an out mode and an in mode.

    Raises:
        OptionError: if the format has no counterpart.

    Example:
        >>> from tnlm.decompositions.kronecker import KroneckerSpec
        >>> spec = KroneckerSpec(1, (2, 3), (3, 2))
        >>> factors = {"left": torch.randn(1, 2, 3), "right": torch.randn(1, 3, 2)}
        >>> to_tensorly("kronecker", (6, 6), spec, factors).rank
        (1, 1, 1)
    """
    if format_name not in WRITERS:
        raise OptionError(
            f"{format_name} has no counterpart in tensorly; allowed: {', '.join(WRITERS)}"
        )
    network = get_format(format_name).network(shape, spec)
    with torch_backend():
        return WRITERS[format_name](network, factors)


def _from_tucker(tensor: Any, outputs: int, _: Any) -> Decomposed:
    core, factors = tensor.core, tensor.factors
    dims = [len(factor) for factor in factors]
    spec = TuckerSpec(tuple(dims[:outputs]), tuple(dims[outputs:]), tuple(core.shape))
    shape = math.prod(spec.out_split), math.prod(spec.in_split)
    network = get_format("tucker").network(shape, spec)
    if "core" not in network.factors:  # a plain matrix: the core goes into one factor
        return Decomposed(
            "tucker", spec, network, {"left": factors[0] @ core, "right": factors[1].T}
        )
    found: Factors = {}
    for mode, factor in enumerate(factors):
        if f"mode{mode}" in network.factors:
            found[f"mode{mode}"] = factor
        else:  # of full rank: the core holds it
            core = torch.tensordot(factor, core, ([1], [mode])).movedim(0, mode)
    return Decomposed("tucker", spec, network, {"core": core, **found})


def _from_cp(tensor: Any, outputs: int, _: Any) -> Decomposed:
    dims = tuple(len(factor) for factor in tensor.factors)
    spec = CPSpec(tensor.factors[0].shape[1], dims[:outputs], dims[outputs:])
    shape = math.prod(spec.out_split), math.prod(spec.in_split)
    network = get_format("cp").network(shape, spec)
    found = dict(zip(network.factors, tensor.factors, strict=True))
    if tensor.weights is not None:
        last = f"mode{len(dims) - 1}"
        found[last] = found[last] * tensor.weights
    return Decomposed("cp", spec, network, found)


def _from_ring(tensor: Any, outputs: int, out_split: Sequence[int] | None) -> Decomposed:
    dims = [core.shape[1] for core in tensor.factors]
    ones = [1] * len(dims)
    out = tuple(out_split or dims[:outputs] + ones[outputs:])
    if len(out) != len(dims) or any(size % part for size, part in zip(dims, out, strict=True)):
        raise RankError(
            f"out_split={out}; allowed: a divisor of each of the sizes {dims}", argument="out_split"
        )
    inp = tuple(size // part for size, part in zip(dims, out, strict=True))
    spec = TensorRingSpec(out, inp, tuple(core.shape[0] for core in tensor.factors))
    network = get_format("tensor-ring").network((math.prod(out), math.prod(inp)), spec)
    found = {
        name: core.reshape(network.shape_of(name))
        for name, core in zip(network.factors, tensor.factors, strict=True)
    }
    return Decomposed("tensor-ring", spec, network, found)


def _from_train(tensor: Any, *_: Any) -> Decomposed:
    cores = tensor.factors
    out, inp = (tuple(core.shape[axis] for core in cores) for axis in (1, 2))
    spec = TensorTrainSpec(out, inp, tuple(core.shape[0] for core in cores[1:]))
    network = get_format("tensor-train").network((math.prod(out), math.prod(inp)), spec)
    found = {
        name: core.reshape(network.shape_of(name))
        for name, core in zip(network.factors, cores, strict=True)
    }
    return Decomposed("tensor-train", spec, network, found)


def _tucker(network: Network, factors: Mapping[str, Tensor]) -> Any:
    from tensorly.tucker_tensor import TuckerTensor

    if "core" not in factors:
        left = factors["left"]
        eye = torch.eye(left.shape[1], dtype=left.dtype, device=left.device)
        return TuckerTensor((eye, [left, factors["right"].T]))
    core = factors["core"]
    sides = [
        factors.get(f"mode{mode}", torch.eye(size, dtype=core.dtype, device=core.device))
        for mode, size in enumerate(core.shape)
    ]
    return TuckerTensor((core, sides))


def _cp(network: Network, factors: Mapping[str, Tensor]) -> Any:
    from tensorly.cp_tensor import CPTensor

    *others, last = factors.values()
    weights = last.norm(dim=0)
    unit = last / torch.where(weights > 0, weights, 1.0)
    return CPTensor((weights, [*others, unit]))


def _ring(network: Network, factors: Mapping[str, Tensor]) -> Any:
    from tensorly.tr_tensor import TRTensor

    rank = network.sizes[network.factors["core0"][0]] if len(network.factors["core0"]) == 4 else 1
    cores = []
    for name, modes in network.factors.items():
        width = network.size("".join(m for m in modes if m in network.out + network.inp))
        cores.append(factors[name].reshape(rank, width, -1))
        rank = cores[-1].shape[-1]
    return TRTensor(cores)


def _train(network: Network, factors: Mapping[str, Tensor]) -> Any:
    from tensorly.tt_matrix import TTMatrix

    cores = []
    for name, modes in network.factors.items():
        out, inp = ("".join(m for m in modes if m in part) for part in (network.out, network.inp))
        before, after = _bonds(network, name)
        order = [modes.index(mode) for mode in before + out + inp + after]
        sizes = [network.size(part) for part in (before, out, inp, after)]
        cores.append(factors[name].permute(order).reshape(sizes))
    return TTMatrix(cores)


def _bonds(network: Network, name: str) -> tuple[str, str]:
    """Return the bonds of a core of a chain with the core before and the core after."""
    names = list(network.factors)
    place = names.index(name)
    modes = network.factors

    def shared(other: int) -> str:
        if not 0 <= other < len(names):
            return ""
        return "".join(mode for mode in modes[name] if mode in modes[names[other]])

    return shared(place - 1), shared(place + 1)


WRITERS: Mapping[str, Callable[[Network, Mapping[str, Tensor]], Any]] = {
    "tucker": _tucker,
    "tensor-train": _train,
    "kronecker": _train,
    "cp": _cp,
    "tensor-ring": _ring,
}
"""Formats that tensorly has an object for."""

READERS: Mapping[str, Callable[[Any, int, Sequence[int] | None], Decomposed]] = {
    "TuckerTensor": _from_tucker,
    "TTMatrix": _from_train,
    "CPTensor": _from_cp,
    "TRTensor": _from_ring,
}
"""Objects of tensorly that are read."""
