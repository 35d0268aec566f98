"""`SubmatrixLinear`: a linear layer that reads some inputs and gives some outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlm.layers.applied import applied_weight, apply_linear
from tnlm.layers.arranged import arrange_made, linear
from tnlm.tensors.network import Factors


class SubmatrixLinear(nn.Module):
    """A linear layer whose weight has some rows and columns, and zeros in place of the others.

    Args:
        shape: ``(out, in)`` of the whole matrix.
        rows: number of rows kept.
        columns: number of columns kept.
        bias: whether to add a bias, of all outputs.
        device: device of the (uninitialised) tensors.
        dtype: their dtype.

    Example:
        >>> layer = SubmatrixLinear((3, 2), 1, 2, bias=False)
        >>> orders = {"rows_order": torch.tensor([2, 0, 1]), "columns_order": torch.arange(2)}
        >>> layer.store({"core": torch.tensor([[1.0, 5.0]]), **orders})(torch.ones(2)).tolist()
        [0.0, 0.0, 6.0]
    """

    rows_order: Tensor
    columns_order: Tensor

    def __init__(
        self,
        shape: tuple[int, int],
        rows: int,
        columns: int,
        *,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the child, uninitialised; see the class for the arguments."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.rows, self.columns = rows, columns
        self.macs = rows * columns
        self.core = linear(rows, columns, arranged=True, device=device, dtype=dtype)
        for name, size in zip(("rows_order", "columns_order"), shape, strict=True):
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64, device=device))
        empty = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @torch.no_grad()
    def store(self, factors: Factors, bias: Tensor | None = None) -> SubmatrixLinear:
        """Copy in the core, the orders of rows and columns, kept ones first, and the bias."""
        self.core.weight.copy_(factors["core"])
        self.rows_order.copy_(factors["rows_order"])
        self.columns_order.copy_(factors["columns_order"])
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        arrange_made(self)
        return self

    def to_dense(self) -> Tensor:
        """Return the ``(out, in)`` weight, with zeros for what was removed."""
        core = applied_weight(self.core)
        padding = (0, self.in_features - self.columns, 0, self.out_features - self.rows)
        whole = F.pad(core, padding)
        return whole[self.rows_order.argsort()][:, self.columns_order.argsort()]

    @property
    def weight(self) -> Tensor:
        """The dense ``(out, in)`` weight; rebuilt at every access."""
        return self.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to ``(..., in)``, giving ``(..., out)``."""
        if self.columns < self.in_features:
            x = x.index_select(-1, self.columns_order[: self.columns])
        h = apply_linear(self.core, x)
        if self.rows < self.out_features:
            zeros = h.new_zeros((*h.shape[:-1], self.out_features))
            h = zeros.index_copy(-1, self.rows_order[: self.rows], h)
        return h if self.bias is None else h + self.bias.to(h.dtype)

    def extra_repr(self) -> str:
        """Show the shape and what is kept of it."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, rows={self.rows}, columns={self.columns}"
        )
