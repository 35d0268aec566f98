"""Pools statistics of experts: those with few tokens borrow from the others of their module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tnlm.calibration.store import Statistics


def lend(store: Statistics, groups: Sequence[Sequence[str]]) -> list[str]:
    """Let modules with few inputs borrow the mean of their group.

    A module with n inputs but m > n columns uses a fraction 1 - n/m of the group's mean over all
    inputs, as if the missing inputs had been drawn from the others'. Its effect on the loss is not
    pooled; a module without inputs gets the effect of a single token.

    Args:
        store: changed, but not a cache on disk.
        groups: modules that have the same function for different tokens, such as one matrix of all
            experts.

    Returns:
        The modules that borrowed. Groups without any inputs do not change.

    Example:
        >>> import torch
        >>> store, eye = Statistics(tokens=4), torch.eye(2).double()
        >>> store.put("a", ["a"], {"moment": eye, "count": torch.tensor(4)})
        >>> store.put("b", ["b"], {"moment": 3 * eye, "count": torch.tensor(1)})
        >>> lend(store, [["a", "b", "c"]])
        ['b', 'c']
        >>> [float(store.tensor(name, "moment")[0, 0]) for name in "abc"]
        [1.0, 2.2, 1.4]
    """
    borrowed: list[str] = []
    for group in groups:
        reached = [name for name in group if name in store.leaders]
        if not reached:
            continue
        leaders = list(dict.fromkeys(store.leaders[name] for name in reached))
        shares = _shares(store, group)
        short = {name: share for name, share in shares.items() if share > 0}
        if short:
            pool = f"{leaders[0]} and {len(leaders) - 1} others"
            if pool not in store.pools:  # another matrix has the same inputs
                store.pool(pool, _mean(store, leaders))
            for name, share in short.items():
                store.lend(name, pool, share)
            borrowed += short
    return borrowed


def _shares(store: Statistics, group: Sequence[str]) -> dict[str, float]:
    """Return the fraction of its statistics that each module borrows."""
    shares = {}
    for name in group:
        if name not in store.leaders:
            shares[name] = 1.0
        elif "count" in store.names(name):
            columns = len(store.tensor(name, "moment"))
            shares[name] = max(0.0, 1.0 - store.count(name) / columns)
    return shares


def _mean(store: Statistics, leaders: Sequence[str]) -> dict[str, Tensor]:
    """Return the mean over inputs; for means over all tokens, the part of a single token."""
    names = store.names(leaders[0])
    counted = "count" in names
    weights = [store.count(each) if counted else 1 for each in leaders]
    whole = max(sum(weights) if counted else store.tokens, 1)
    found = {}
    for name in names:
        if name != "count":
            total = torch.zeros_like(store.tensor(leaders[0], name))
            for weight, leader in zip(weights, leaders, strict=True):
                total += weight * store.tensor(leader, name)
            found[name] = total / whole
    return found
