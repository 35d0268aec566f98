"""`FactorizedEmbedding` looks up rows without rebuilding the table; `FactorizedHead` shares it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tnlm.tensors.contraction import pairwise
from tnlm.tensors.network import Factors, Network

CHUNK_NUMBERS = 2**22
"""Elements of the table that a head rebuilds at once, if it has to rebuild."""


class _Table(nn.Module):
    """A (vocabulary, width) matrix stored as a network's factors, one `nn.Parameter` each."""

    def __init__(
        self,
        network: Network,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.num_embeddings, self.embedding_dim = network.shape
        self.plan = pairwise(network)
        for name in network.factors:
            shape = network.shape_of(name)
            setattr(self, name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))

    @torch.no_grad()
    def store(self, factors: Factors, bias: Tensor | None = None) -> _Table:
        """Copy in the factors."""
        for name in self.network.factors:
            getattr(self, name).copy_(factors[name])
        return self

    def factors(self) -> Factors:
        """Return all factors."""
        return {name: getattr(self, name) for name in self.network.factors}

    def rows(self, ids: Tensor | slice) -> Tensor:
        """Return rows ``(count, width)`` of the table, for ids ``(count,)`` or a slice of them."""
        operands = [
            self._take(getattr(self, name), ids)
            if self.network.out in modes
            else getattr(self, name)
            for name, modes in self.network.factors.items()
        ]
        return self.plan(operands).flatten(1)

    @staticmethod
    def _take(factor: Tensor, ids: Tensor | slice) -> Tensor:
        if isinstance(ids, slice):
            return factor[ids]
        taken: Tensor = F.embedding(ids, factor.flatten(1)).unflatten(1, factor.shape[1:])
        return taken

    def to_dense(self) -> Tensor:
        """Return the whole ``(vocabulary, width)`` table."""
        return self.rows(slice(None))

    @property
    def weight(self) -> Tensor:
        """The dense ``(vocabulary, width)`` table; rebuilt at every access."""
        factors = list(self.factors().values())
        if any(factor.is_meta for factor in factors):
            # While a model is loaded, transformers reads the weight's shape if a head has a bias.
            return torch.empty(self.network.shape, dtype=factors[0].dtype, device="meta")
        return self.to_dense()

    def extra_repr(self) -> str:
        """Show the shape and the equation."""
        return f"{self.num_embeddings}, {self.embedding_dim}, equation={self.network.equation!r}"


class FactorizedEmbedding(_Table):
    """An embedding whose rows are computed from the factors of a network.

    Example:
        >>> net = Network({"left": "vr", "right": "ri"}, "v", "i", {"v": 10, "r": 2, "i": 4})
        >>> factors = {"left": torch.randn(10, 2), "right": torch.randn(2, 4)}
        >>> layer = FactorizedEmbedding(net).store(factors)
        >>> layer(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 4])
    """

    padding_idx: int | None = None
    max_norm: float | None = None  # attributes of nn.Embedding, which adapters read
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    @property
    def in_features(self) -> int:
        """The size of the vocabulary, which a LoRA of a table takes as its input size."""
        return self.num_embeddings

    @property
    def out_features(self) -> int:
        """The width of a row."""
        return self.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """Look up ids ``(...)``, giving ``(..., width)``."""
        return self.rows(ids.reshape(-1)).reshape(*ids.shape, self.embedding_dim)


class FactorizedHead(_Table):
    """The output head that shares its factors with a `FactorizedEmbedding`.

    If the vocabulary is in one factor only, the hidden state passes through the factors: first the
    shared one, (bond, last input mode), then (row, bond, other input modes). Otherwise the table is
    rebuilt some rows at a time, never as a whole.
    """

    def __init__(
        self,
        network: Network,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the uninitialised factors, and the head's own bias."""
        super().__init__(network, device=device, dtype=dtype)
        self.out_features, self.in_features = network.shape
        empty = torch.empty(self.out_features, device=device, dtype=dtype) if bias else None
        self.bias = None if empty is None else nn.Parameter(empty)
        holders = [name for name, modes in network.factors.items() if network.out in modes]
        self.holder = holders[0] if len(holders) == 1 and len(network.factors) == 2 else None
        self.modes = tuple(network.sizes[mode] for mode in network.inp)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits ``(..., vocabulary)`` of hidden states ``(..., width)``."""
        if self.holder is None:
            logits = torch.cat([F.linear(hidden, rows) for rows in self._chunks()], dim=-1)
        else:
            shared = next(name for name in self.network.factors if name != self.holder)
            inner = F.linear(hidden.unflatten(-1, self.modes), getattr(self, shared))
            inner = inner.movedim(-1, -len(self.modes)).flatten(-len(self.modes))
            logits = F.linear(inner, getattr(self, self.holder).flatten(1))
        return logits if self.bias is None else logits + self.bias

    def _chunks(self) -> Iterator[Tensor]:
        step = max(CHUNK_NUMBERS // self.embedding_dim, 1)
        for start in range(0, self.num_embeddings, step):
            yield self.rows(slice(start, start + step))
