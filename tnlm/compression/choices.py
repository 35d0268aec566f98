"""Every keyword of `tnlm.compress`, written once: its group, its default and what it does.

The call, the command line, the checks and the record in the report follow from these fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnlm.errors import OptionError
from tnlm.schemes import get_scheme
from tnlm.schemes.base import Scheme, choice

AUTO = "auto"


@dataclass(frozen=True)
class Calibration:
    """The data that statistics are gathered from, and how it is cut; None stands for a default.

    Example:
        >>> Calibration([1, 2], seed=7).cut.seed, Calibration([1, 2]).cut.max_length
        (7, 512)
    """

    data: Any = choice(
        None, "Text or JSONL file, for schemes that look at data.", keyword="calibration"
    )
    tokenizer: Any = choice(None, "Turns texts into ids.", shell=False)
    num_samples: int | None = choice(None, "Windows of calibration data; 64 if not given.")
    max_length: int | None = choice(None, "Tokens in a window; 512 if not given.")
    bos: bool | str | None = choice(
        None, "Begin windows of text with BOS; as the tokenizer does, if not given."
    )
    gradient_samples: int | None = choice(None, "Windows used for gradients; 16 if not given.")
    cache_dir: str | Path | None = choice(None, "Keeps calibration statistics between runs.")
    seed: int | None = choice(None, "Draws windows and all else that is random; 0 if not given.")

    @property
    def cut(self) -> Cut:
        """How the data is cut and drawn, with defaults for what is not given."""
        names = [item.name for item in dataclasses.fields(Cut)]
        given = {name: getattr(self, name) for name in names}
        return Cut(**{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Cut:
    """How data is cut and drawn."""

    num_samples: int = 64
    max_length: int = 512
    bos: bool | str = AUTO
    gradient_samples: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Budget:
    """How large the result may be: at most one of ``keep``, ``keep_targets`` and ``tolerance``."""

    keep: float | None = choice(None, "Fraction of the whole model's parameters to keep.")
    keep_targets: float | None = choice(None, "Fraction of the targets' parameters to keep.")
    tolerance: float | None = choice(None, "Relative error allowed to a matrix.")
    max_macs: float = choice(1.0, "Multiply-adds of a matrix, at most this multiple of dense.")
    unit: str = choice("params", "What keep counts: params, bytes or macs.")
    blocks: int | None = choice(None, "Last blocks that are cut, for allocation last.")


@dataclass(frozen=True)
class Recovery:
    """How quality is won back after fitting."""

    kind: str | None = choice(
        None,
        "Training after the fit: lora, distill, finetune, mixed-rank, mixed-rank-frozen or none.",
        keyword="recover",
    )
    tokens: int | None = choice(
        None,
        "Tokens to train on, and to prune with; 200,000 if not given.",
        keyword="recover_tokens",
    )
    training: Any = choice(
        None, "Text or JSONL file to train on; the calibration data if not given."
    )
    refine: int = choice(0, "Tokens on which every block is tuned after fitting; 0 for none.")


GROUPS: Mapping[str, type] = {
    "scheme": Scheme,
    "calibration": Calibration,
    "budget": Budget,
    "recovery": Recovery,
}
"""What holds the choices, by the keyword that takes such an object."""


@dataclass(frozen=True)
class Choice:
    """One keyword of `tnlm.compress`.

    Attributes:
        keyword: as it is written in the call.
        group: what holds it, a key of `GROUPS`.
        field: its name there.
        type: of its values, as it is annotated.
        default: what stands there if it is not given.
        text: what it does, in one sentence.
        shell: whether the command line has an option for it.
    """

    keyword: str
    group: str
    field: str
    type: str
    default: Any
    text: str
    shell: bool


def choices_of(*groups: str) -> Iterator[Choice]:
    """Yield the keywords of groups; of all if none is named.

    Example:
        >>> [each.keyword for each in choices_of("budget")][:3]
        ['keep', 'keep_targets', 'tolerance']
    """
    for group in groups or GROUPS:
        for item in dataclasses.fields(GROUPS[group]):
            if "text" in item.metadata:
                given = dict(item.metadata)
                keyword = given.pop("keyword") or item.name
                yield Choice(keyword, group, item.name, str(item.type), item.default, **given)


@dataclass(frozen=True)
class Asked:
    """A call's arguments in their groups, and the options of the scheme's formats."""

    scheme: Scheme
    calibration: Calibration
    budget: Budget
    recovery: Recovery
    options: Mapping[str, Any]


def gather_choices(scheme: str | Scheme, given: Mapping[str, Any]) -> Asked:
    """Return the arguments of a call in their groups.

    Args:
        scheme: a name, or a scheme.
        given: keywords with their values, groups as whole objects among them; None counts as not
            given.

    Raises:
        OptionError: if a keyword is given beside the group that holds it, or a group is of another
            class.

    Example:
        >>> asked = gather_choices("kron", {"terms": 4, "keep": 0.5, "metric": "input"})
        >>> asked.scheme.metric, asked.budget.keep, asked.options
        ('input', 0.5, {'terms': 4})
    """
    left = {name: value for name, value in given.items() if value is not None}
    base: dict[str, Any] = {"scheme": scheme if isinstance(scheme, Scheme) else get_scheme(scheme)}
    for group, kind in GROUPS.items():
        if group == "scheme":
            continue
        whole = left.pop(group, None)
        if group == "calibration" and not isinstance(whole, Calibration):
            whole = Calibration(whole)
        base[group] = kind() if whole is None else whole
        if not isinstance(base[group], kind):
            raise OptionError(
                f"{group}= is a {type(whole).__name__}; give a tnlm.{kind.__name__}(...)"
            )
    fields: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for each in choices_of():
        if each.keyword not in left:
            continue
        value = left.pop(each.keyword)
        held = getattr(base[each.group], each.field)
        is_default = held is None or (each.default is not None and held == each.default)
        if each.group != "scheme" and not is_default:
            raise OptionError(
                f"{each.keyword}= and {each.group}= with {each.field}={held!r} given; give one"
            )
        fields[each.group][each.field] = value
    made = {group: dataclasses.replace(base[group], **fields[group]) for group in GROUPS}
    return Asked(**made, options=left)


def scheme(name: str, **changes: Any) -> Scheme:
    """Return a changed copy of a named scheme, to be given to `tnlm.compress` in its place.

    Args:
        name: a name from ``tnlm.list_schemes()``.
        **changes: fields of `tnlm.schemes.base.Scheme`, e.g. ``metric`` or ``allocation``; what is
            no such field is an option of its formats.

    Raises:
        OptionError: for an unknown name; for others :func:`tnlm.compress` raises it.

    Example:
        >>> scheme("kron", metric="input", terms=4).defaults
        {'terms': 4}
    """
    named = get_scheme(name)
    fields = {item.name for item in dataclasses.fields(Scheme)} - {"name", "defaults"}
    own = {key: value for key, value in changes.items() if key in fields}
    options = {key: value for key, value in changes.items() if key not in fields}
    return dataclasses.replace(named, **own, defaults={**named.defaults, **options})
