"""Whether two computations of the same give the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def equal(found: Any, expected: Any) -> bool:
    """Return whether two arguments contain the same tensors."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return found.shape == expected.shape and bool((found == expected).all())
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return type(found) is type(expected)


def same(state: Tensor, expected: Tensor | None) -> bool:
    """Return whether two computations of a tensor agree, up to rounding."""
    if expected is None or state.shape != expected.shape:
        return False
    expected = expected.float()
    return bool((state.float() - expected).norm() <= 1e-3 * expected.norm())
