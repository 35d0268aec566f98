"""Parses dotted names of matrices: the block they are in, and their kind within a block."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BLOCK = re.compile(r"(^|\.)(\d+)(?=\.)")


def split_at_block(name: str) -> tuple[str, int, str] | None:
    """Split a dotted name at its block number, into prefix, number and suffix.

    The block number is the first part that is a number; return None if there is none.

    Example:
        >>> split_at_block("model.layers.3.experts.0.up_proj"), split_at_block("lm_head")
        (('model.layers', 3, 'experts.0.up_proj'), None)
    """
    found = _BLOCK.search(name)
    if found is None:
        return None
    return name[: found.start()], int(found[2]), name[found.end() + 1 :]


def block_of(name: str) -> int | None:
    """Return the number of the block that a module is, or is in; None outside of blocks.

    Example:
        >>> block_of("model.layers.12.mlp.up_proj"), block_of("h.3"), block_of("lm_head")
        (12, 3, None)
    """
    found = split_at_block(f"{name}.")
    return None if found is None else found[1]


def place(name: str) -> tuple[str, int]:
    """Return a matrix's kind (its name without the block number) and its block (-1 if none).

    Example:
        >>> place("model.layers.3.mlp.up_proj"), place("lm_head")
        (('model.layers.mlp.up_proj', 3), ('lm_head', -1))
    """
    kinds, block = [], -1
    for member in name.split("+"):  # several matrices with one decision
        found = split_at_block(member)
        if found is not None:
            before, block, after = found
            member = f"{before}.{after}"
        kinds.append(member)
    return "+".join(kinds), block


def beginning(names: Sequence[str]) -> str:
    """Return the prefix that all names share, up to a dot; empty for fewer than two names.

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
    """Return names without the prefix that they all share.

    Example:
        >>> unprefixed(["model.0.up", "model.1.up", "model.1.gate+model.1.up"])
        {'model.0.up': '0.up', 'model.1.up': '1.up', 'model.1.gate+model.1.up': '1.gate+1.up'}
    """
    cut = beginning(names)
    return {
        name: "+".join(member.removeprefix(cut) for member in name.split("+")) for name in names
    }


def shortened(kinds: Sequence[str]) -> dict[str, str]:
    """Return short names of kinds: without the shared prefix; for joined kinds, the last parts.

    Example:
        >>> shortened(["mlp.up", "mlp.down", "mlp.gate+mlp.up"])
        {'mlp.up': 'up', 'mlp.down': 'down', 'mlp.gate+mlp.up': 'gate+up'}
    """
    cut = unprefixed(kinds)
    return {
        kind: cut[kind] if "+" not in kind else "+".join(m.split(".")[-1] for m in kind.split("+"))
        for kind in kinds
    }
