"""Rules for choices and their combinations; every error lists what is allowed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from tnlm.allocation.base import Allocation
from tnlm.compression.choices import Recovery, choices_of
from tnlm.decompositions.base import Format, from_dict
from tnlm.errors import OptionError, did_you_mean
from tnlm.metrics.measure import INPUTS, MOVEMENT, SURGERY, Measure
from tnlm.metrics.named import measures
from tnlm.recovery.kinds import recoveries
from tnlm.utils.checks import is_whole

CASCADES = ("none", "sequential", "anchored")
NO_RECOVERY = "none"
ADAPTED = {"linear", "submatrix"}
"""Kinds of targets whose layers take adapters."""


def check_measure(scheme: str, structures: Sequence[Format[Any]], measure: Measure) -> None:
    """Raise `OptionError` unless every format can be fitted under the metric.

    Beside other formats, those for embeddings only are not checked: data gives them no metric.
    """
    fitted = [structure for structure in structures if structure.kinds != {"embedding"}]
    for structure in fitted or structures:
        asked = measure.needs or "experts" in structure.metrics
        if asked and measure.form not in structure.metrics:
            raise OptionError(
                f"metric={measure.name!r} with scheme {scheme!r}: {structure.name} can be fitted "
                f"only under {_allowed(structure)}",
                argument="metric",
            )


def _allowed(structure: Format[Any]) -> str:
    plain = "experts" not in structure.metrics
    kinds = {m.name for m in measures().values() if not m.needs and plain}
    kinds |= {m.name for m in measures().values() if m.form in structure.metrics}
    return ", ".join(sorted(kinds))


def check_options(scheme: str, structures: Sequence[Format[Any]], given: Mapping[str, Any]) -> None:
    """Raise `OptionError` unless every option belongs to a format and has a valid value."""
    known: set[str] = set()
    for structure in structures:
        items = dataclasses.fields(structure.spec)
        fields = {item.name: _placeholder(item) for item in items}
        known |= {item.name for item in items if "fixed" not in item.metadata}
        from_dict(structure.spec, fields | {k: v for k, v in given.items() if k in fields})
    keywords = {each.keyword for each in choices_of()} | {"targets", "ignore", "progress"}
    for name in given:
        if name not in known:
            raise OptionError(
                f"unknown option {name!r} for scheme {scheme!r}"
                f"{did_you_mean(name, known, keywords)}",
                argument=known,
            )


def check_fitting(
    structures: Sequence[Format[Any]], measure: Measure, given: Mapping[str, Any]
) -> None:
    """Raise `OptionError` if options that belong to some metrics are given with another one."""
    fields = [item for structure in structures for item in dataclasses.fields(structure.spec)]
    for item in fields:
        only = item.metadata.get("metric", measure.name)
        if item.name in given and only != measure.name:
            raise OptionError(
                f"{item.name}={given[item.name]!r} has no effect with metric={measure.name!r}; "
                f"allowed with metric={only!r}",
                argument=(item.name, "metric"),
            )
    for name in (item.name for item in fields if "fitting" in item.metadata):
        if name in given and not measure.elementwise:
            allowed = ", ".join(m.name for m in measures().values() if m.elementwise)
            raise OptionError(
                f"{name}={given[name]!r} has no effect with metric={measure.name!r}, whose fit is "
                f"in closed form; allowed with metric={allowed!r}",
                argument=(name, "metric"),
            )


def _placeholder(item: dataclasses.Field[Any]) -> Any:
    """Return a valid value for a field not given, so that the given ones can be checked."""
    if item.default is not dataclasses.MISSING:
        return item.default
    return (1,) if "tuple" in str(item.type) else 1


def check_damping(measure: Measure, damping: float | None) -> None:
    """Raise `OptionError` unless damping is a fraction, and the metric has a moment to damp."""
    if damping is None:
        return
    if not measure.needs:
        raise OptionError(
            "damping= has no effect with metric='identity'; leave it out",
            argument=("damping", "metric"),
        )
    if not is_number(damping) or not 0 <= damping < 1:
        raise OptionError(f"damping={damping!r}; allowed: a fraction in [0, 1)", argument="damping")


def check_cascade(measure: Measure, cascade: str) -> None:
    """Raise `OptionError` unless the cascade is known, and the metric uses inputs."""
    if not is_word(cascade, CASCADES):
        raise OptionError(f"unknown cascade {cascade!r}{did_you_mean(str(cascade), CASCADES)}")
    if cascade != "none" and SURGERY in measure.needs:
        raise OptionError(
            f"cascade={cascade!r} with metric={measure.name!r}, which has measured the changed "
            "model itself; allowed: cascade='none'",
            argument=("cascade", "metric"),
        )
    if cascade != "none" and INPUTS not in measure.needs:
        raise OptionError(
            f"cascade={cascade!r} with metric={measure.name!r}, which does not use inputs; "
            "allowed: a metric that does, such as 'input' or 'two-sided'",
            argument=("cascade", "metric"),
        )


def check_anchor(cascade: str, anchor: float) -> None:
    """Raise `OptionError` unless ``anchor`` is a fraction, and the cascade is anchored."""
    if not is_number(anchor) or not 0 <= anchor <= 1:
        raise OptionError(f"anchor={anchor!r}; allowed: a fraction in [0, 1]", argument="anchor")
    if anchor != 1 and cascade != "anchored":
        raise OptionError(
            f"anchor={anchor!r} has no effect with cascade={cascade!r}; allowed with "
            "cascade='anchored'",
            argument=("anchor", "cascade"),
        )


def check_channels(structures: Sequence[Format[Any]], measure: Measure, cascade: str) -> None:
    """Raise `OptionError` unless the metric and the cascade can select channels or heads."""
    narrowed = {"channels", "channel-ranks", "heads"}
    chosen = [each.name for each in structures if each.kinds & narrowed]
    if not chosen:
        return
    if measure.name not in ("input", "two-sided") or cascade != "none":
        raise OptionError(
            f"metric={measure.name!r} and cascade={cascade!r} cannot select {' or '.join(chosen)}; "
            "allowed: metric='input' or 'two-sided', and cascade='none'",
            argument=("metric", "cascade"),
        )


def check_joint(structures: Sequence[Format[Any]], measure: Measure, cascade: str) -> None:
    """Raise `OptionError` unless matrices can be replaced together by the formats that do so."""
    joint = [structure.name for structure in structures if structure.made_of]
    if joint and (cascade != "none" or measure.adds_bias):
        raise OptionError(
            f"cascade={cascade!r} and metric={measure.name!r} with a {joint[0]}, which replaces "
            "several matrices together; allowed: cascade='none', and a metric that adds no bias",
            argument=("metric", "cascade"),
        )


def check_share(
    structures: Sequence[Format[Any]], measure: Measure, cascade: str, share: int
) -> None:
    """Raise `OptionError` unless the formats and the metric let blocks share a factor."""
    if not is_whole(share) or share < 1:
        raise OptionError(
            f"share={share!r}; allowed: a number of blocks, 1 for none", argument="share"
        )
    if share == 1:
        return
    wrong = [structure.name for structure in structures if not structure.stacks]
    if wrong or cascade != "none" or measure.adds_bias:
        what = wrong[0] if wrong else f"cascade={cascade!r} or metric={measure.name!r}"
        raise OptionError(
            f"share={share} with {what}; allowed: low rank, cascade='none', and a metric that "
            "adds no bias",
            argument=("share", "cascade"),
        )


def check_split(split: bool) -> None:
    """Raise `OptionError` unless ``split`` is True or False."""
    if not isinstance(split, bool):
        raise OptionError(f"split={split!r}; allowed: True or False", argument="split")


def check_shared_formats(
    allocation: Allocation,
    structures: Sequence[Format[Any]],
    measure: Measure,
    sizes: Sequence[str] = (),
) -> None:
    """Raise `OptionError` unless the allocation supports the formats, the metric and sizes."""
    if sizes and not allocation.takes_sizes:
        raise OptionError(
            f"{sizes[0]}= with allocation={allocation.name!r}, which chooses it; give keep=",
            argument=(sizes[0], "allocation"),
        )
    if SURGERY in measure.needs and allocation.metric != measure.name:
        raise OptionError(
            f"metric={measure.name!r} with allocation={allocation.name!r}; allowed: "
            f"allocation={measure.name!r}, as all matrices are operated on together",
            argument=("metric", "allocation"),
        )
    if allocation.metric not in (None, measure.name):
        raise OptionError(
            f"allocation={allocation.name!r} with metric={measure.name!r}; allowed: "
            f"{allocation.metric}",
            argument=("allocation", "metric"),
        )
    for structure in structures:
        if allocation.formats is not None and structure.name not in allocation.formats:
            raise OptionError(
                f"allocation={allocation.name!r} with {structure.name}; allowed: "
                + ", ".join(sorted(allocation.formats)),
                argument="allocation",
            )


def is_word(value: Any, allowed: Sequence[str]) -> bool:
    """Return whether a value is one of the allowed strings; arrays cannot be compared to them."""
    return isinstance(value, str) and value in allowed


def is_number(value: Any) -> bool:
    """Return whether a value is a real number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_refine(recovery: Recovery, default: int) -> tuple[int, int]:
    """Return the tokens and the passes to tune each block on, of which at most one is not 0.

    Args:
        recovery: holds ``refine`` and ``refine_passes``.
        default: the passes if neither is given.

    Raises:
        OptionError: unless both are whole numbers, and at most one is given, or both are 0.
    """
    given = {"refine": recovery.refine, "refine_passes": recovery.refine_passes}
    for name, value in given.items():
        if value is not None and (not is_whole(value) or value < 0):
            what = "tokens" if name == "refine" else "passes over the windows trained on"
            raise OptionError(
                f"{name}={value!r}; allowed: a number of {what}, 0 for none", argument=name
            )
    both = recovery.refine is not None and recovery.refine_passes is not None
    if both and (recovery.refine or recovery.refine_passes):
        raise OptionError(
            f"refine={recovery.refine} tokens and refine_passes={recovery.refine_passes} are both "
            "given; give one",
            argument=("refine", "refine_passes"),
        )
    if recovery.refine_passes is not None:
        return 0, recovery.refine_passes
    return (0, default) if recovery.refine is None else (recovery.refine, 0)


def refinement_asked(tokens: int, passes: int) -> str:
    """Return the keyword of a refinement with its value, or nothing if there is none.

    Example:
        >>> refinement_asked(512, 0), refinement_asked(0, 25), refinement_asked(0, 0)
        ('refine=512', 'refine_passes=25', '')
    """
    if tokens:
        return f"refine={tokens}"
    return f"refine_passes={passes}" if passes else ""


def check_recover(
    structures: Sequence[Format[Any]], measure: Measure, recover: str, tokens: int | None
) -> None:
    """Raise `OptionError` unless the recovery is known, and has tokens and layers to train."""
    known = (NO_RECOVERY, *recoveries())
    if not is_word(recover, known):
        raise OptionError(f"unknown recover {recover!r}{did_you_mean(str(recover), known)}")
    made = frozenset().union(*(each.kinds | each.made_of for each in structures))
    if recover != NO_RECOVERY and recoveries()[recover].adapts and made and not made & ADAPTED:
        raise OptionError(
            f"recover={recover!r} trains compressed linear layers, and {structures[0].name} makes "
            "none; allowed: 'finetune' or 'distill'",
            argument="recover",
        )
    if tokens is None:
        return
    if recover == "none" and MOVEMENT not in measure.needs:
        raise OptionError(
            "recover_tokens= has no effect without recover=; leave it out",
            argument=("recover_tokens", "recover"),
        )
    if not is_whole(tokens) or tokens < 1:
        raise OptionError(
            f"recover_tokens={tokens!r}; allowed: a number of tokens >= 1",
            argument="recover_tokens",
        )
