"""What safetensors files may hold that is not so: tensors, headers, bytes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.hostile.draft import ODD, Draft, Tensors

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4,
         "U8": 1, "BOOL": 1, "C64": 8}  # fmt: skip


def _some(draft: Draft, tensors: Tensors, kind: str = "") -> str:
    """Choose a tensor, of a dtype if it matters."""
    found = [name for name, one in tensors.items() if kind in ("", one[0])]
    return draft.rng.choice(found or list(tensors))


def another_dtype(draft: Draft) -> None:
    """A tensor of its shape, of a dtype that no weight has, or that has fewer digits."""

    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors)
        kind = draft.rng.choice([k for k in BYTES if k not in (tensors[name][0], "F64")])
        tensors[name] = (kind, tensors[name][1], bytes(BYTES[kind] * math.prod(tensors[name][1])))

    draft.rewrite(change)


def cast(draft: Draft) -> None:
    """The same numbers in fewer or more digits: one tensor, or all."""

    def change(tensors: Tensors) -> None:
        kind, dtype = draft.rng.choice([("F16", np.float16), ("F64", np.float64)])
        floats = [name for name, one in tensors.items() if one[0] == "F32"]
        for name in draft.rng.choice([floats, [draft.rng.choice(floats)]]):
            values = np.frombuffer(tensors[name][2], np.float32).astype(dtype)
            tensors[name] = (kind, tensors[name][1], values.tobytes())

    draft.rewrite(change)


def not_finite(draft: Draft) -> None:
    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors, "F32")
        values = np.frombuffer(tensors[name][2], np.float32).copy()
        values[draft.rng.randrange(len(values))] = draft.rng.choice([np.nan, np.inf, -np.inf])
        tensors[name] = ("F32", tensors[name][1], values.tobytes())

    draft.rewrite(change)


def broken_order(draft: Draft) -> None:
    """Rows are named twice, or are none; without orders, another tensor becomes whole numbers."""

    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors, "I64")
        count = math.prod(tensors[name][1])
        rows = np.arange(count, dtype=np.int64)
        rows[draft.rng.randrange(count)] = draft.rng.choice([count, -1, 2**62, -(2**63)])
        twice = np.zeros(count, dtype=np.int64)
        wrong = [rows, twice, rows.astype(np.int32), twice.astype(np.float32)]
        chosen = draft.rng.choice(wrong if tensors[name][0] == "I64" else wrong[:3])
        kind = {"int64": "I64", "int32": "I32", "float32": "F32"}[str(chosen.dtype)]
        tensors[name] = (kind, tensors[name][1], chosen.tobytes())

    draft.rewrite(change)


def another_order(draft: Draft) -> None:
    """A sound order, but not the right one."""

    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors, "I64")
        if tensors[name][0] == "I64":
            rows = np.frombuffer(tensors[name][2], np.int64)[::-1]
            tensors[name] = ("I64", tensors[name][1], rows.tobytes())

    draft.rewrite(change)


def another_shape(draft: Draft) -> None:
    """The same numbers in another shape, none, or one more row."""

    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors)
        kind, shape, data = tensors[name]
        flat, empty = [math.prod(shape)], [0, *shape[1:]]
        taller = [shape[0] + 1, *shape[1:]]
        more = data + bytes(BYTES[kind] * math.prod(shape[1:]))
        choices = [(flat, data), ([1, *shape], data), (empty, b""), (taller, more)]
        choices += [(shape[::-1], data)] if shape != shape[::-1] else []
        tensors[name] = (kind, *draft.rng.choice(choices))

    draft.rewrite(change)


def missing(draft: Draft) -> None:
    draft.rewrite(lambda tensors: tensors.pop(_some(draft, tensors)))


def extra(draft: Draft) -> None:
    """A tensor more: of a strange name, or of a name that stands for another's."""

    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors)
        names = (
            "extra",
            "",
            ".",
            "weight",
            f"{name}.weight",
            name.partition(".")[2],
            f"model.{name}",
        )
        tensors[draft.rng.choice(names)] = tensors[name]

    draft.rewrite(change)


def renamed(draft: Draft) -> None:
    def change(tensors: Tensors) -> None:
        name = _some(draft, tensors)
        names = (name + "x", name.upper(), name.replace("left", "core"), f"x.{name}")
        tensors[draft.rng.choice(names)] = tensors.pop(name)

    def really(tensors: Tensors) -> None:
        before = set(tensors)
        change(tensors)
        if set(tensors) == before:
            tensors["x"] = tensors.pop(_some(draft, tensors))

    draft.rewrite(really)


def exchanged(draft: Draft) -> None:
    """Two tensors of one shape change places."""

    def change(tensors: Tensors) -> None:
        a = _some(draft, tensors, "F32")
        b = draft.rng.choice([n for n, one in tensors.items() if one[:2] == tensors[a][:2]])
        tensors[a], tensors[b] = tensors[b], tensors[a]

    draft.rewrite(change)


def flipped_bit(draft: Draft) -> None:
    file = draft.weights()
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    data[draft.rng.randrange(8 + size, len(data))] ^= 1 << draft.rng.randrange(8)
    file.write_bytes(data)


def flipped_header(draft: Draft) -> None:
    file = draft.weights()
    data = bytearray(file.read_bytes())
    (size,) = struct.unpack("<Q", data[:8])
    data[draft.rng.randrange(8 + size)] ^= 1 << draft.rng.randrange(8)
    file.write_bytes(data)


def odd_header(draft: Draft) -> None:
    """A field of a header holds anything, or says other places."""

    def change(header: dict[str, Any]) -> None:
        name = draft.rng.choice([key for key in header if key != "__metadata__"])
        field = draft.rng.choice(["dtype", "shape", "data_offsets"])
        begin, end = header[name]["data_offsets"]
        places = [[0, end], [begin, end + 4], [end, begin], [-4, end], [begin, 2**63], [begin]]
        value = draft.rng.choice(places if field == "data_offsets" else ODD)
        header[name][field] = value

    draft.header(change)


def odd_metadata(draft: Draft) -> None:
    values = [*ODD, {"format": "tf"}, {"format": 1}, {"a": "b" * 10_000}]
    draft.header(lambda header: header.update(__metadata__=draft.rng.choice(values)))


def odd_length(draft: Draft) -> None:
    """A file ends early or late, or its header says that it is of another length."""
    file = draft.weights()
    data = file.read_bytes()
    lengths = [0, 1, 10**6, 2**31, 2**63, 2**64 - 1]
    lies = [struct.pack("<Q", length) + data[8:] for length in lengths]
    cuts = [data[: draft.rng.randrange(len(data))], data[:8], b"", data + b"x", data * 2]
    others = [b"\0" * 100, b"PK\x03\x04" + data, b"\x80\x02" + data]
    file.write_bytes(draft.rng.choice(lies + cuts + others))


FAMILY: list[tuple[Callable[[Draft], None], int, bool]] = [
    (another_dtype, 2, False), (cast, 1, True), (not_finite, 2, False), (broken_order, 2, False),
    (another_order, 1, True), (another_shape, 2, False), (missing, 2, False), (extra, 1, False),
    (renamed, 1, False), (exchanged, 1, True), (flipped_bit, 1, True), (flipped_header, 2, True),
    (odd_header, 2, True), (odd_metadata, 1, True), (odd_length, 2, False),
]  # fmt: skip
