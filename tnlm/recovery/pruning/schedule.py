"""A cubic schedule for quantities that change during training."""

from __future__ import annotations

from tnlm.errors import OptionError


def cubic(
    step: int, steps: int, *, start: float = 1.0, end: float, warmup: int = 0, cooldown: int = 0
) -> float:
    """Return the value at a step: constant, then changing fast and ever more slowly, then constant.

    With T steps, of which t_i are warm-up and t_f cool-down, the value at step t between these is
    end + (start − end)((T − t_f − t) / (T − t_f − t_i))³.

    Args:
        step: from 0 to ``steps``.
        steps: total number of steps.
        start: value during the warm-up.
        end: value during the cool-down, and after the last step.
        warmup: number of steps at the start value.
        cooldown: number of steps at the end value.

    Raises:
        OptionError: if a count is negative, or warm-up plus cool-down exceed the training.

    Source: Zhu and Gupta 2017 (arXiv 1710.01878); as in movement pruning, LPAF and LoRAPrune.

    Example:
        >>> [cubic(step, 6, end=0.0, warmup=1, cooldown=1) for step in (0, 1, 3, 5, 6)]
        [1.0, 1.0, 0.125, 0.0, 0.0]
    """
    last = steps - cooldown
    if min(step, steps, warmup, cooldown) < 0 or warmup > last:
        raise OptionError(
            f"step {step} of steps={steps} with warmup={warmup} and cooldown={cooldown}: none may "
            "be negative, and warm-up plus cool-down may not exceed steps"
        )
    if step >= last:
        return end
    if step < warmup:
        return start
    return end + (start - end) * ((last - step) / (last - warmup)) ** 3
