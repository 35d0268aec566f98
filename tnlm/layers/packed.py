"""Layers whose matrix is held as packed codes and scales: `PackedLinear`, `PackedEmbedding`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlm.precision.grid import Precision
from tnlm.precision.kernels import aligned, has_kernel, int8_product
from tnlm.precision.packing import pack, unpack
from tnlm.precision.rounding import Rounded, moved


class Packed(nn.Module):
    """A matrix of few bits, packed in memory as in files.

    Scales are a parameter, so that training can change them; codes stay what they are.

    Args:
        rows: of the matrix.
        columns: of the matrix.
        precision: the grid.
        device: where the (uninitialised) tensors are made.
        dtype: of the scales.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        precision: Precision,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tensors, uninitialised; see the class for the arguments."""
        super().__init__()
        self.columns, self.precision = columns, precision
        groups = precision.groups(columns)
        self.codes: Tensor
        self.zeros: Tensor | None
        kind = torch.int8 if precision.bits == 8 else torch.uint8  # signed, as the kernel takes it
        codes = torch.empty(rows, precision.packed(columns), device=device, dtype=kind)
        self.register_buffer("codes", codes)
        self.scales = nn.Parameter(torch.empty(rows, groups, device=device, dtype=dtype))
        zeros = torch.empty(rows, groups, device=device, dtype=torch.uint8)
        self.register_buffer("zeros", None if precision.symmetric else zeros)

    @torch.no_grad()
    def fill(self, rounded: Rounded) -> None:
        """Pack and copy in what was rounded."""
        codes = pack(rounded.codes, self.precision.bits)
        self.codes.copy_(codes.int() - self._held)
        self.scales.copy_(rounded.scales)
        if self.zeros is not None and rounded.zeros is not None:
            self.zeros.copy_(rounded.zeros)

    @torch.no_grad()
    def add(self, change: Tensor) -> None:
        """Add a change ``(rows, columns)`` as far as codes reach: scales stay, so small ones go."""
        stored = Rounded(self.precision, self._codes(), self.scales, self.zeros)
        self.fill(moved(stored, change))

    def _codes(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Return the codes of some rows, as small whole numbers from 0."""
        codes = unpack(self.codes[index], self.precision.bits, self.columns)
        return (codes.int() + self._held).to(torch.uint8)

    @property
    def weight(self) -> Tensor:
        """The whole matrix, put together at every access."""
        return self.rows(slice(None))

    def rows(self, index: Tensor | slice) -> Tensor:
        """Return some rows of the matrix, ``(count, columns)``."""
        return self._centred(index) * self._spread(self.scales[index])

    def _centred(self, index: Tensor | slice) -> Tensor:
        """Return the codes of some rows less their zeros, exact in every floating dtype."""
        codes = unpack(self.codes[index], self.precision.bits, self.columns).to(self.scales.dtype)
        if self.zeros is not None:
            return codes - self._spread(self.zeros[index].to(codes.dtype) - self._held)
        return codes if self._held else codes - self.precision.levels // 2

    @property
    def _held(self) -> int:
        """What is subtracted from codes in memory."""
        return 128 if self.codes.dtype is torch.int8 else 0

    def _spread(self, values: Tensor) -> Tensor:
        """Return a value of every group for each of its columns; one a row stays one."""
        if values.shape[1] == 1:
            return values
        width = self.precision.width(self.columns)
        return values.repeat_interleave(width, 1)[:, : self.columns]

    def product(self, x: Tensor) -> Tensor:
        """Return ``(..., rows)`` for ``(..., columns)``."""
        trained = torch.is_grad_enabled() and self.scales.requires_grad
        if self.scales.dtype is x.dtype and not trained and has_kernel(x, self.precision):
            self.codes = aligned(self.codes)  # at most once
            return int8_product(x, self.codes, self.scales)
        if self.scales.shape[1] == 1 and x.dtype is not torch.float16:  # whose sums overflow
            # Codes are exact in bfloat16, a weight put together of them would be rounded again.
            return F.linear(x, self._centred(slice(None)).to(x.dtype)) * self.scales.T.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """Show the sizes and the grid."""
        grid = f"{self.precision.name}, group={self.precision.group}"
        return f"{len(self.codes)}, {self.columns}, {grid}"


class PackedLinear(Packed):
    """A linear map with a weight of few bits.

    int8 is multiplied by torch's kernel in bfloat16 on the CPU; elsewhere the weight is put
    together for each product.

    Args:
        rows: size of its outputs.
        columns: size of its inputs.
        precision: the grid.
        bias: whether a bias is added.
        device: where the (uninitialised) tensors are made.
        dtype: of the scales and of the bias.

    Example:
        >>> from tnlm.precision.rounding import nearest
        >>> weight = torch.randn(4, 16)
        >>> layer = PackedLinear(4, 16, Precision(8)).store(nearest(weight, Precision(8)))
        >>> bool((layer.weight - weight).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        precision: Precision,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the tensors, uninitialised; see the class for the arguments."""
        super().__init__(rows, columns, precision, device=device, dtype=dtype)
        self.out_features, self.in_features = rows, columns
        empty = torch.empty(rows, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)

    @torch.no_grad()
    def store(self, rounded: Rounded, bias: Tensor | None = None) -> PackedLinear:
        """Pack and copy in what was rounded, and the bias."""
        self.fill(rounded)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Apply the map to ``(..., in)``, giving ``(..., out)``."""
        h = self.product(x)
        return h if self.bias is None else h + self.bias.to(h.dtype)


class PackedEmbedding(Packed):
    """A table of few bits, of which only the rows looked up are put together.

    Example:
        >>> from tnlm.precision.rounding import nearest
        >>> table = PackedEmbedding(10, 16, Precision(4)).store(
        ...     nearest(torch.randn(10, 16), Precision(4)))
        >>> table(torch.tensor([[3, 7]])).shape
        torch.Size([1, 2, 16])
    """

    padding_idx: int | None = None

    def store(self, rounded: Rounded, bias: Tensor | None = None) -> PackedEmbedding:
        """Pack and copy in what was rounded; a table has no bias."""
        self.fill(rounded)
        return self

    def forward(self, ids: Tensor, *, as_head: bool = False) -> Tensor:
        """Return the rows of token ids ``(...)``; or, as a head, the logits of hidden states."""
        if as_head:
            return self.product(ids)
        return self.rows(ids.flatten()).reshape(*ids.shape, self.columns)


class PackedHead(nn.Module):
    """An output head that reads the codes of a packed embedding.

    Args:
        bias: the head's own bias, if any.

    Example:
        >>> from tnlm.precision.rounding import nearest
        >>> table = PackedEmbedding(10, 16, Precision(4)).store(
        ...     nearest(torch.randn(10, 16), Precision(4)))
        >>> PackedHead().share(table)(torch.randn(1, 16)).shape
        torch.Size([1, 10])
    """

    def __init__(self, bias: nn.Parameter | None = None) -> None:
        """Take the bias; :meth:`share` brings the table."""
        super().__init__()
        self.bias = bias
        self._tables: list[
            PackedEmbedding
        ] = []  # in a list, so that it is not a child of two modules

    def share(self, table: PackedEmbedding) -> PackedHead:
        """Read a table from now on."""
        self._tables = [table]
        return self

    @property
    def weight(self) -> Tensor:
        """The whole table, put together at every access."""
        return self._tables[0].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., vocabulary)`` of hidden states ``(..., width)``."""
        logits: Tensor = self._tables[0](hidden, as_head=True)  # hooks bring what is offloaded
        return logits if self.bias is None else logits + self.bias
