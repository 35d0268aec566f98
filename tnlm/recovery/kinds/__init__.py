"""Named recoveries: one file each, discovered automatically; they import trainers when they run."""

from __future__ import annotations

from tnlm.recovery.kinds.base import TOKENS, RecoveryKind
from tnlm.utils.registry import Registry

RECOVERIES: Registry[RecoveryKind] = Registry(__name__, "RECOVERY", "recover")


def recoveries() -> dict[str, RecoveryKind]:
    """Return every recovery by name.

    Example:
        >>> recoveries()["distill"].needs_teacher
        True
    """
    return RECOVERIES.all()


def get_recovery(name: str) -> RecoveryKind:
    """Return a recovery by name.

    Raises:
        OptionError: if the name is unknown.
    """
    return RECOVERIES.get(name)


def tokens_of(name: str) -> int:
    """Return how many tokens a recovery trains on by default, or metrics that prune for "none".

    Example:
        >>> tokens_of("correct"), tokens_of("none")
        (65536, 200000)
    """
    return RECOVERIES.all()[name].tokens if name in RECOVERIES.all() else TOKENS
