"""Every keyword of `tnlm.compress`, defined once: its group, its default and its help text.

The call, the command line, the checks and the record in the report are derived from these fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tnlm.allocation import allocations
from tnlm.errors import OptionError
from tnlm.metrics.named import measures
from tnlm.recovery.kinds import recoveries
from tnlm.schemes import get_scheme
from tnlm.schemes.base import Scheme, choice

AUTO = "auto"


@dataclass(frozen=True)
class Calibration:
    """The data for statistics, and how it is cut into windows; None stands for the default.

    Example:
        >>> Calibration([1, 2], seed=7).cut.seed, Calibration([1, 2]).cut.max_length
        (7, 512)
    """

    data: Any = choice(
        None,
        "Calibration data: a text, JSONL or parquet file, or self for text that the model writes.",
        keyword="calibration",
    )
    tokenizer: Any = choice(None, "Turns texts into token ids.", shell=False)
    num_samples: int | None = choice(None, "Calibration windows; 64 by default.")
    max_length: int | None = choice(None, "Tokens per window; 512 by default.")
    bos: bool | str | None = choice(
        None, "Start each window of text with BOS; by default, as the tokenizer does."
    )
    gradient_samples: int | None = choice(None, "Windows used for gradients; 16 by default.")
    cache_dir: str | Path | None = choice(None, "Keeps calibration statistics between runs.")
    seed: int | None = choice(None, "Seed for the windows and other random choices; 0 by default.")
    column: str | tuple[str, str] | None = choice(
        None, "Column of texts, in data with named columns; in Python two of them for pairs."
    )
    lora_rank: int | None = choice(
        None, "Rank of the LoRA whose gradients weight the columns (metrics lora-); 8 by default."
    )
    lora_steps: int | None = choice(
        None, "Steps that train this LoRA meanwhile; 0 by default, 100 for the metric lora-kept."
    )
    lora_step: float | None = choice(
        None, "Weight of the quadratic term of the gradient that it gives; 0 by default."
    )
    temperature: float | None = choice(
        None, "Temperature of text that the model writes, for calibration self; 1 by default."
    )

    @property
    def cut(self) -> Cut:
        """How the data is cut and drawn, with defaults filled in."""
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
    keep_targets: float | None = choice(
        None,
        "Fraction of the targets' parameters to keep; 0.8 for most schemes if no size is given.",
    )
    tolerance: float | None = choice(None, "Relative error allowed per matrix.")
    max_macs: float = choice(1.0, "Maximum multiply-adds per matrix, as a multiple of dense.")
    unit: str | None = choice(
        None, "Unit of the budget: params, bytes, macs or time; params by default."
    )
    workload: str | None = choice(
        None, "What unit time predicts: decode, prefill, or decode:8 or prefill:128; decode."
    )
    prices: str | Path | None = choice(
        None, "A machine.json with the times of another machine, for unit time."
    )
    blocks: int | None = choice(None, "Number of last blocks to compress, for allocation last.")
    portable: str | None = choice(
        None, "Runtime that runs the result without tnlm: llama.cpp, transformers or decilm."
    )


@dataclass(frozen=True)
class Recovery:
    """Training that recovers quality after fitting."""

    kind: str | None = choice(None, "Training after fitting: {names} or none.", keyword="recover")
    tokens: int | None = choice(
        None,
        "Tokens to train on, also for metrics that prune; 200,000 by default, 65,536 for correct.",
        keyword="recover_tokens",
    )
    training: Any = choice(
        None, "Training data: a text or JSONL file; the calibration data by default."
    )
    refine: int | None = choice(
        None, "Tokens to tune each block on after fitting; 0 for no tuning."
    )
    refine_passes: int | None = choice(
        None,
        "The same, in passes over the windows trained on; by default, as many as the scheme has.",
    )


GROUPS: Mapping[str, type] = {
    "scheme": Scheme,
    "calibration": Calibration,
    "budget": Budget,
    "recovery": Recovery,
}
"""The classes that hold the choices, by the keyword that takes an instance."""
SIZES = ("rank", "ranks", "terms", "width")
"""Options of formats that set the size of every matrix."""
NAMES: Mapping[str, Callable[[], Iterable[str]]] = {
    "metric": measures,
    "allocation": allocations,
    "recover": recoveries,
}
"""What stands for ``{names}`` in a help text: all that is registered, by keyword."""


@dataclass(frozen=True)
class Choice:
    """One keyword of `tnlm.compress`.

    Attributes:
        keyword: its name in the call.
        group: the class that holds it, a key of `GROUPS`.
        field: its name in that class.
        type: the annotation of its values.
        default: its value if not given.
        text: its help text, one sentence.
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
    """Yield the keywords of the named groups, or of all groups.

    Example:
        >>> [each.keyword for each in choices_of("budget")][:3]
        ['keep', 'keep_targets', 'tolerance']
    """
    for group in groups or GROUPS:
        for item in dataclasses.fields(GROUPS[group]):
            if "text" in item.metadata:
                given = dict(item.metadata)
                keyword = given.pop("keyword") or item.name
                if keyword in NAMES:
                    given["text"] = given["text"].format(names=", ".join(NAMES[keyword]()))
                yield Choice(keyword, group, item.name, str(item.type), item.default, **given)


@dataclass(frozen=True)
class Asked:
    """A call's arguments by group, and the options of the scheme's formats."""

    scheme: Scheme
    calibration: Calibration
    budget: Budget
    recovery: Recovery
    options: Mapping[str, Any]


def gather_choices(scheme: str | Scheme, given: Mapping[str, Any]) -> Asked:
    """Sort the arguments of a call into their groups.

    Args:
        scheme: a name, or a scheme.
        given: keywords and values, possibly whole groups; None counts as not given.

    Raises:
        OptionError: if a keyword and its group give two values, or a group has the wrong class.

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
                f"{each.keyword}= and {each.group}= with {each.field}={held!r} are both given; "
                "give one"
            )
        fields[each.group][each.field] = value
    named: Scheme = base["scheme"]
    if base["calibration"].data is not None and named.metric == "identity":
        budget = dataclasses.replace(base["budget"], **fields["budget"])
        fields["scheme"] = _with_data(named, fields["scheme"], budget, {**named.defaults, **left})
    made = {group: dataclasses.replace(base[group], **fields[group]) for group in GROUPS}
    return Asked(**made, options=left)


def _with_data(
    named: Scheme, given: Mapping[str, Any], budget: Budget, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields given for a scheme, with its choices for data where they are left open.

    Args:
        named: the scheme.
        given: fields that the call changes.
        budget: if it sets a tolerance, or no size while the options do, nothing is to be allocated.
        options: options of the formats.
    """
    chosen = dict(named.with_data)
    sized = budget.keep is None and budget.keep_targets is None and any(n in options for n in SIZES)
    fixed = sized or budget.tolerance is not None
    if "metric" in given or named.allocation != Scheme.allocation or fixed:
        chosen.pop("allocation", None)
    return {**chosen, **given}


def scheme(name: str, **changes: Any) -> Scheme:
    """Return a copy of a named scheme with some choices changed, for `tnlm.compress`.

    Args:
        name: a name from ``tnlm.list_schemes()``.
        **changes: fields of `tnlm.schemes.base.Scheme`, e.g. ``metric`` or ``allocation``, or
            options of the scheme's formats.

    Raises:
        OptionError: if the name is unknown; :func:`tnlm.compress` checks the changes.

    Example:
        >>> scheme("kron", metric="input", terms=4).defaults
        {'terms': 4}
    """
    named = get_scheme(name)
    fields = {item.name for item in dataclasses.fields(Scheme)} - {"name", "defaults"}
    open_to_data = {} if "metric" in changes else named.with_data
    left = {field: value for field, value in open_to_data.items() if field not in changes}
    changes = {"with_data": left, **changes}
    own = {key: value for key, value in changes.items() if key in fields}
    options = {key: value for key, value in changes.items() if key not in fields}
    return dataclasses.replace(named, **own, defaults={**named.defaults, **options})
