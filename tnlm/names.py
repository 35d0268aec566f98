"""What a matrix's dotted name says: its block, and what it is in every block."""

from __future__ import annotations

import re
from collections.abc import Sequence


def place(name: str) -> tuple[str, int]:
    """Return a matrix's kind, its name without the block, and its block, -1 if it is in none.

    Example:
        >>> place("model.layers.3.mlp.up_proj"), place("lm_head")
        (('model.layers.mlp.up_proj', 3), ('lm_head', -1))
    """
    kinds, block = [], -1
    for member in name.split("+"):  # what was decided for several together
        found = re.search(r"(^|\.)(\d+)(?=\.)", member)
        if found is not None:
            member, block = member[: found.start()] + member[found.end() :], int(found.group(2))
        kinds.append(member)
    return "+".join(kinds), block


def beginning(names: Sequence[str]) -> str:
    """Return what all names begin with, up to a dot; nothing for less than two.

    Example:
        >>> beginning(["model.0.up", "model.1.up", "model.1.gate+model.1.up"])
        'model.'
    """
    parts = [member.split(".") for name in names for member in name.split("+")]
    shared = 0
    while len(parts) > 1 and all(
        len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts
    ):
        shared += 1
    return "".join(f"{part}." for part in parts[0][:shared]) if parts else ""


def unprefixed(names: Sequence[str]) -> dict[str, str]:
    """Return names without what all begin with.

    Example:
        >>> unprefixed(["model.0.up", "model.1.up", "model.1.gate+model.1.up"])
        {'model.0.up': '0.up', 'model.1.up': '1.up', 'model.1.gate+model.1.up': '1.gate+1.up'}
    """
    cut = beginning(names)
    return {
        name: "+".join(member.removeprefix(cut) for member in name.split("+")) for name in names
    }


def shortened(kinds: Sequence[str]) -> dict[str, str]:
    """Return kinds without the beginning that all share; of those decided together, the last names.

    Example:
        >>> shortened(["mlp.up", "mlp.down", "mlp.gate+mlp.up"])
        {'mlp.up': 'up', 'mlp.down': 'down', 'mlp.gate+mlp.up': 'gate+up'}
    """
    cut = unprefixed(kinds)
    return {
        kind: cut[kind] if "+" not in kind else "+".join(m.split(".")[-1] for m in kind.split("+"))
        for kind in kinds
    }
