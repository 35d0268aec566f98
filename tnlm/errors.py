"""Every error that tnlm raises on purpose, all subclasses of :class:`TnlmError`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TnlmError(Exception):
    """Base of all tnlm errors; messages state the request, what is allowed, and where it failed.

    Attributes:
        arguments: the keywords that the message names, in whose place the command line shows its
            options.

    Example:
        >>> OptionError("keep=2; allowed: a fraction in (0, 1]", argument="keep").arguments
        ('keep',)
    """

    def __init__(self, message: str = "", *, argument: str | Iterable[str] = ()) -> None:
        """Say what went wrong, and with which arguments."""
        super().__init__(message)
        self.arguments = (argument,) if isinstance(argument, str) else tuple(argument)


class OptionError(TnlmError, ValueError):
    """An unknown scheme, option or option value."""


class RankError(OptionError):
    """A rank, a number of terms or a split that the matrix cannot have."""


class BudgetError(OptionError):
    """A budget that is out of range or that no plan can meet."""


class TargetError(TnlmError, ValueError):
    """A choice of target matrices that matches nothing, or nothing that can be compressed."""


class CalibrationError(TnlmError, ValueError):
    """Calibration data that is missing, empty, too short or not finite."""


class ModelError(TnlmError, ValueError):
    """A model that cannot be compressed as it is: quantized, compressed already, or not finite."""


class CheckpointError(TnlmError, OSError):
    """A directory or file that cannot be written, or whose contents do not fit the model."""


class CapacityError(TnlmError, ValueError):
    """Memory or disk that a run needs, and that a cap or a disk does not allow."""


class ProcessError(TnlmError, RuntimeError):
    """Processes that share work but cannot meet, differ, or have stopped."""


class EvaluationError(TnlmError, ValueError):
    """A measurement that has no meaning: too little text, or a loss that is not finite."""


class TrainingError(TnlmError, ValueError):
    """Training data that cannot be used, or training whose loss is not finite."""


def did_you_mean(word: str, allowed: Iterable[str], others: Iterable[str] = ()) -> str:
    """Return ``"; did you mean 'kron'? Allowed: ..."`` for an unknown ``word``.

    Args:
        word: the unknown word.
        allowed: names to list.
        others: more names to suggest, too many to list.

    Example:
        >>> did_you_mean("kro", ["kron", "svd"])
        "; did you mean 'kron'? Allowed: kron, svd"
    """
    names = sorted(allowed)
    close = difflib.get_close_matches(word, {*names, *others}, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{hint} Allowed: {', '.join(names) or 'none'}"
