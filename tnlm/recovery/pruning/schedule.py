"""How a quantity goes from one value to another while a model trains."""

from __future__ import annotations

from tnlm.errors import OptionError


def cubic(
    step: int, steps: int, *, start: float = 1.0, end: float, warmup: int = 0, cooldown: int = 0
) -> float:
    """Return the value at a step: held, then falling fast and ever more slowly, then held.

    With T steps, of which t_i warm up and t_f cool down, it is at step t between the two
    end + (start − end)((T − t_f − t) / (T − t_f − t_i))³.

    Args:
        step: from 0 to ``steps``.
        steps: how many there are.
        start: value until ``warmup`` is over.
        end: value in the last ``cooldown`` steps, and after the last.
        warmup: steps at the start value.
        cooldown: steps at the end value.

    Raises:
        OptionError: if a count is negative, or warm-up and cool-down are longer than the training.

    Source: Zhu and Gupta 2017 (arXiv 1710.01878); as in movement pruning, LPAF and LoRAPrune.

    Example:
        >>> [cubic(step, 6, end=0.0, warmup=1, cooldown=1) for step in (0, 1, 3, 5, 6)]
        [1.0, 1.0, 0.125, 0.0, 0.0]
    """
    last = steps - cooldown
    if min(step, steps, warmup, cooldown) < 0 or warmup > last:
        raise OptionError(
            f"step {step} of steps={steps} with warmup={warmup} and cooldown={cooldown}: none may "
            "be negative, and warm-up and cool-down together take at most all steps"
        )
    if step >= last:
        return end
    if step < warmup:
        return start
    return end + (start - end) * ((last - step) / (last - warmup)) ** 3
