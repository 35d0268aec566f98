"""Caches dense weights beside their factors, for long inputs, within a memory limit."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from tnlm.errors import OptionError


class RebuiltWeights:
    """A cache of the most recently rebuilt weights, as many as fit.

    A weight is rebuilt after any of its factors has changed.

    Args:
        max_bytes: most bytes of all cached weights.

    Example:
        >>> kept = RebuiltWeights(max_bytes=2**20)
        >>> kept.bytes
        0
    """

    def __init__(self, max_bytes: int) -> None:
        """Start empty."""
        if max_bytes < 0:
            raise OptionError(f"max_bytes={max_bytes}; allowed: 0 or more")
        self.max_bytes = max_bytes
        self.bytes = 0
        self._kept: OrderedDict[int, tuple[object, Tensor]] = OrderedDict()

    def weight(self, layer: Any) -> Tensor:
        """Return a layer's dense weight, from the cache if its factors have not changed."""
        state = tuple((p, p.data_ptr(), _version(p)) for p in layer.parameters())
        found = self._kept.get(id(layer))
        if found is not None and _same(found[0], state):
            self._kept.move_to_end(id(layer))
            return found[1]
        weight: Tensor = layer.to_dense()
        self._drop(id(layer))
        size = weight.numel() * weight.element_size()
        while self._kept and self.bytes + size > self.max_bytes:
            self._drop(next(iter(self._kept)))
        if size <= self.max_bytes:
            self._kept[id(layer)] = (state, weight)
            self.bytes += size
        return weight

    def _drop(self, key: int) -> None:
        found = self._kept.pop(key, None)
        if found is not None:
            self.bytes -= found[1].numel() * found[1].element_size()

    def __deepcopy__(self, _: object) -> RebuiltWeights:
        """Return an empty cache, since the copy of a model has its own factors."""
        return RebuiltWeights(self.max_bytes)

    def __reduce__(self) -> tuple[type[RebuiltWeights], tuple[int]]:
        """Pickle only the limit."""
        return RebuiltWeights, (self.max_bytes,)


def keep_rebuilt(model: nn.Module, max_bytes: int) -> RebuiltWeights:
    """Cache rebuilt dense weights in a model where they are faster, typically for prefill.

    Without this, a layer rebuilds its weight at every call where that is faster. Training and
    compiled graphs do not use cached weights. Low rank is never rebuilt, since its factors are
    faster at any length.

    Args:
        model: a compressed model; its previous cache is dropped.
        max_bytes: most bytes of all cached weights; 0 disables the cache.

    Returns:
        The cache, whose ``bytes`` is its current size.

    Raises:
        OptionError: if the limit is negative.

    Example:
        >>> keep_rebuilt(nn.Linear(2, 2), max_bytes=2**30).bytes
        0
    """
    kept = RebuiltWeights(max_bytes)
    for module in model.modules():
        if hasattr(module, "keep_rebuilt"):
            module.keep_rebuilt(kept if max_bytes else None)  # type: ignore[operator]
    return kept


def _version(parameter: Tensor) -> int:
    """Return how often a tensor was written to; 0 for inference tensors, which do not count."""
    return 0 if parameter.is_inference() else parameter._version


def _same(before: Any, now: Any) -> bool:
    """Return whether parameters are the same objects, at the same address, unchanged."""
    return len(before) == len(now) and all(
        a[0] is b[0] and a[1:] == b[1:] for a, b in zip(before, now, strict=True)
    )
