"""What config.json may say of the compression that is not so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.hostile.draft import ODD, Draft
from tnlm.decompositions import formats

KEYS = ("kind", "shape", "bias", "format", "options", "order", "padding_idx", "full", "cut")
FIELDS = ("quant_method", "format_version", "scheme", "options", "modules", "tied")


def odd_value(draft: Draft) -> None:
    """A field of an entry holds anything."""
    draft.entry(lambda entry: entry.update({draft.rng.choice(KEYS): draft.rng.choice(ODD)}))


def no_field(draft: Draft) -> None:
    draft.entry(lambda entry: entry.pop(draft.rng.choice(list(entry))))


def another_shape(draft: Draft) -> None:
    def change(entry: dict[str, Any]) -> None:
        sizes = entry["shape"]
        others = [sizes[::-1], [sizes[0] + 1, sizes[1]], [sizes[0] * 2, sizes[1] // 2], sizes[:1]]
        entry["shape"] = draft.rng.choice([*others, [10**9, 10**9], [-s for s in sizes]])

    draft.entry(change)


def another_option(draft: Draft) -> None:
    """A rank, a split or a flag is another one."""

    def change(entry: dict[str, Any]) -> None:
        options = entry.get("options") or {"rank": 4}
        name = draft.rng.choice(list(options))
        value = options[name]
        if isinstance(value, bool):
            options[name] = not value
        elif isinstance(value, int):
            options[name] = draft.rng.choice([value - 1, value + 1, 2 * value, 10**15])
        elif isinstance(value, list):
            ones = [1] * 100_000 + value
            options[name] = draft.rng.choice(
                [value[::-1], [*value, 1], value[:-1], ones, [2, *value]]
            )
        entry["options"] = options

    draft.entry(change)


def another_format(draft: Draft) -> None:
    names = sorted(formats())
    draft.entry(lambda entry: entry.update(format=draft.rng.choice(names)))


def another_kind(draft: Draft) -> None:
    kinds = ("linear", "dense", "sliced", "fused", "embedding", "head")
    draft.entry(lambda entry: entry.update(kind=draft.rng.choice(kinds)))


def another_order(draft: Draft) -> None:
    def change(entry: dict[str, Any]) -> None:
        order = entry.get("order") or ["left", "right"]
        entry["order"] = draft.rng.choice([order[::-1], order[:1], order * 2, [*order, "x"]])

    draft.entry(change)


def another_flag(draft: Draft) -> None:
    names = ("conv1d", "bias_added", "shared")
    draft.entry(lambda entry: entry.update({draft.rng.choice(names): draft.rng.choice(ODD)}))


def other_parts(draft: Draft) -> None:
    """A fused module's parts are reversed, renamed or fewer; others become fused."""

    def change(stored: dict[str, Any]) -> None:
        name = draft.rng.choice(list(stored["modules"]))
        entry = stored["modules"][name]
        parts = entry.get("parts", [{"name": "a", **entry}])
        renamed = [{**part, "name": part["name"] + "x"} for part in parts]
        others = [parts[::-1], renamed, parts[1:], parts * 2, [], None, "parts"]
        stored["modules"][name] = {"kind": "fused", "parts": draft.rng.choice(others)}

    draft.edit(change)


def other_modules(draft: Draft) -> None:
    """An entry is missing, stands elsewhere, or is no entry."""

    def change(stored: dict[str, Any]) -> None:
        modules, rng = stored["modules"], draft.rng
        name, other = rng.choice(list(modules)), rng.choice(list(modules))
        places = (
            "",
            ".",
            "a..b",
            "model",
            "model.norm",
            "lm_head",
            "config",
            "x" * 10_000,
            "é.\ud800",
        )
        choice = rng.randrange(5)
        if choice == 0:
            del modules[name]
        elif choice == 1:
            modules[name], modules[other] = modules[other], modules[name]
        elif choice == 2:
            modules[rng.choice(places)] = modules[name]
        elif choice == 3:
            modules[rng.choice(places)] = modules.pop(name)
        else:
            modules[name] = rng.choice(ODD)

    draft.edit(change)


def many_modules(draft: Draft) -> None:
    def change(stored: dict[str, Any]) -> None:
        entry = next(iter(stored["modules"].values()))
        stored["modules"].update({f"model.layers.{i}.mlp.up_proj": entry for i in range(20_000)})

    draft.edit(change)


def other_ties(draft: Draft) -> None:
    def change(stored: dict[str, Any]) -> None:
        rng, tied = draft.rng, stored["tied"]
        names = [*stored["modules"]]
        a, b = (f"{rng.choice(names)}.{rng.choice(('left', 'right', 'core0'))}" for _ in "ab")
        ties = [{}, None, [], {a: b}, {a + ".weight": b + ".weight"}, {a: a}, {a: 1}, {"x.y": b}]
        ties += [{source: target for target, source in tied.items()}, {**tied, "model.norm": a}]
        stored["tied"] = rng.choice(ties)

    draft.edit(change)


def odd_field(draft: Draft) -> None:
    """A field of the whole holds anything."""
    draft.edit(lambda stored: stored.update({draft.rng.choice(FIELDS): draft.rng.choice(ODD)}))


def fewer_fields(draft: Draft) -> None:
    draft.edit(lambda stored: stored.pop(draft.rng.choice(list(stored))))


def more_fields(draft: Draft) -> None:
    """Fields of a later version, or names that Python knows."""
    names = ("later", "self", "__class__", "quant_method ", "dequantize", "load_in_4bit", "bits")
    draft.edit(lambda stored: stored.update({draft.rng.choice(names): draft.rng.choice(ODD)}))


def nothing_said(draft: Draft) -> None:
    config = draft.config()
    config["quantization_config"] = draft.rng.choice(ODD)
    draft.write(config)


# How often each is drawn, and whether only a sum could know what it does.
FAMILY: list[tuple[Callable[[Draft], None], int, bool]] = [
    (odd_value, 4, True), (no_field, 2, True), (another_shape, 2, False), (another_option, 3, True),
    (another_format, 1, True), (another_kind, 1, True), (another_order, 2, True),
    (another_flag, 1, True), (other_parts, 2, True), (other_modules, 3, False),
    (other_ties, 2, True), (odd_field, 2, True), (fewer_fields, 1, True), (more_fields, 1, True),
    (nothing_said, 1, False),
]  # fmt: skip
