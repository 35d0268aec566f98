"""The same fits as other libraries do them; each is optional, and imported when asked.

All get the float32 matrix and the modes and ranks of our spec. A sum of Kronecker products is a
tensor train of two cores.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Fitted = Callable[[], Tensor]
"""Rebuilds the matrix that was fitted."""


class NotInstalled(Exception):  # noqa: N818
    """The library of a row is missing."""


def torch_svd(name: str, spec: Any, weight: Tensor) -> Fitted:
    """Decompose in full, keep the leading triplets."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    left, right = u[:, : spec.rank] * s[: spec.rank], vh[: spec.rank]
    return lambda: left @ right


def tensorly_fit(name: str, spec: Any, weight: Tensor) -> Fitted:
    """Run ``tensor_train_matrix`` or ``tucker`` with its own truncated SVD."""
    try:
        import tensorly
        from tensorly.decomposition import tensor_train_matrix, tucker
    except ImportError as missing:
        raise NotInstalled from missing
    before = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        tensor = weight.reshape(spec.out_split + spec.in_split)
        if name == "tucker":
            core, factors = tucker(tensor, list(spec.ranks), n_iter_max=10, tol=1e-6)
            return lambda: _multiplied(core, factors).reshape(weight.shape)
        cores = tensor_train_matrix(tensor, [1, *_ranks(spec), 1]).factors
        return lambda: _rebuild(cores, weight)
    finally:
        tensorly.set_backend(before, local_threadsafe=True)


def torchtt_fit(name: str, spec: Any, weight: Tensor) -> Fitted:
    """Run ``torchtt.TT`` on the matrix, cut by ranks alone."""
    try:
        import torchtt
    except ImportError as missing:
        raise NotInstalled from missing
    tensor = weight.reshape(spec.out_split + spec.in_split)
    modes = list(zip(spec.out_split, spec.in_split, strict=True))
    found = torchtt.TT(tensor, modes, eps=1e-12, rmax=[1, *_ranks(spec), 1])
    return lambda: _rebuild(found.cores, weight)


def tntorch_fit(name: str, spec: Any, weight: Tensor) -> Fitted:
    """Run ``tntorch.TTMatrix``, whose first modes are those of its inputs: our outputs."""
    try:
        import tntorch
    except ImportError as missing:
        raise NotInstalled from missing
    found = tntorch.TTMatrix(weight, list(_ranks(spec)), list(spec.out_split), list(spec.in_split))
    return lambda: _rebuild([core.squeeze(0) for core in found.cores], weight)


def _multiplied(core: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """Return a core with every mode multiplied by its factor."""
    for mode, factor in enumerate(factors):
        core = torch.tensordot(core, factor, ([mode], [1])).movedim(-1, mode)
    return core


def _ranks(spec: Any) -> tuple[int, ...]:
    return getattr(spec, "ranks", None) or (spec.terms,)


def _rebuild(cores: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Contract cores ``(rank, out, in, rank)`` to the matrix."""
    table = cores[0].double()
    for core in cores[1:]:
        table = torch.tensordot(table, core.double(), 1)
    table = table.squeeze(0).squeeze(-1)
    modes = string.ascii_letters[: table.dim()]
    return torch.einsum(f"{modes}->{modes[::2]}{modes[1::2]}", table).reshape(weight.shape)


PEERS = {
    "torch.linalg.svd": torch_svd,
    "tensorly": tensorly_fit,
    "torchTT": torchtt_fit,
    "tntorch": tntorch_fit,
}
