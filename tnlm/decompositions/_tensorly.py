"""Calls tensorly: PyTorch backend, this thread only, integer ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tnlm.tensors.linalg import truncated_svd


@contextmanager
def torch_backend() -> Iterator[None]:
    """Use tensorly with torch tensors; other threads and the caller keep their backend."""
    import tensorly  # takes half a second to import, and most schemes do not need it

    previous = tensorly.get_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        with torch.no_grad():
            yield
    finally:
        tensorly.set_backend(previous, local_threadsafe=True)


def _svd(matrix: Tensor, n_eigenvecs: int | None = None, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a truncated SVD, with the signature that tensorly expects."""
    svd = truncated_svd(matrix, n_eigenvecs)
    return svd.u, svd.s, svd.vh


def multi_mode_dot(tensor: Tensor, factors: Sequence[Tensor], modes: Sequence[int]) -> Tensor:
    """Multiply each mode of a tensor by its transposed factor, and return the core."""
    import tensorly.tenalg

    with torch_backend():
        core: Tensor = tensorly.tenalg.multi_mode_dot(tensor, factors, modes=modes, transpose=True)
    return core


def tt_matrix(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return TT-matrix cores ``(rank, out, in, rank)`` by TT-SVD.

    Args:
        tensor: all out modes, then all in modes.
        ranks: one for each inner bond.

    Source: Oseledets, "Tensor-train decomposition", 2011; the matrix form: 2010.
    """
    from tensorly.decomposition import tensor_train_matrix

    with torch_backend():
        return list(tensor_train_matrix(tensor, [1, *ranks, 1], svd=_svd).factors)
