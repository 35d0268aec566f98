"""The items that decide a search and those that its result is reported on: none may be in both."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tnlm.errors import EvaluationError


def name_of(item: Any) -> str:
    """Return a name for the contents of an item; only equal items share it.

    Raises:
        EvaluationError: if an item holds other things than plain values, tensors or arrays.

    Example:
        >>> name_of({"a": 1, "b": [2]}) == name_of({"b": (2,), "a": 1}) != name_of("a")
        True
    """
    try:
        text = json.dumps(item, sort_keys=True, default=_plain)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"an item is a {type(item).__name__} whose contents cannot be compared ({error}); "
            "build items from plain values, tensors or arrays"
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()


def check_disjoint(search: Sequence[Any], report: Sequence[Any]) -> tuple[str, str]:
    """Raise an error if the splits share an item; return a name for the contents of each.

    Raises:
        EvaluationError: if a split is empty, or an item is in both.

    Example:
        >>> check_disjoint(["a"], ["b", "a"])
        Traceback (most recent call last):
        tnlm.errors.EvaluationError: item 1 of report= is item 0 of search=; ...
    """
    for split, items in (("search", search), ("report", report)):
        if len(items) == 0:
            raise EvaluationError(f"{split}= has no items; at least 1 is needed", argument=split)
    names = [name_of(item) for item in search]
    seen = {name: index for index, name in enumerate(names)}
    others = [name_of(item) for item in report]
    for index, name in enumerate(others):
        if name in seen:
            raise EvaluationError(
                f"item {index} of report= is item {seen[name]} of search=; results must be "
                "reported on items that decided nothing: remove it from one of them",
                argument=("report", "search"),
            )
    return name_of(names), name_of(others)


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not plain")


def chunks_of(items: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut items into equal parts, of which the last may be one shorter; return none for one part.

    Raises:
        EvaluationError: if there are fewer items than parts.

    Example:
        >>> chunks_of([1, 2, 3, 4, 5], 2), chunks_of([1, 2], 1)
        ([[1, 2, 3], [4, 5]], [])
    """
    if count == 1:
        return []
    if len(items) < count:
        raise EvaluationError(
            f"chunks={count}, but there are only {len(items)} items; use at most one chunk per "
            "item",
            argument="chunks",
        )
    size, longer = divmod(len(items), count)
    ends = [size * number + min(number, longer) for number in range(count + 1)]
    return [items[start:end] for start, end in itertools.pairwise(ends)]
