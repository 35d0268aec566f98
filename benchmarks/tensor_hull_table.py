"""What rows of tensor_hull.py say: harm of structures on the hull of auto's own choices."""

from __future__ import annotations

import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float]
"""Parameters and harm."""
NAMES = ("kron", "hybrid", "tucker", "cp")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def hull(points: Sequence[Point]) -> list[Point]:
    """Return the lower convex hull of (price, harm) points."""
    found: list[Point] = []
    for point in sorted(points):
        while found and point[1] >= found[-1][1] and point[0] >= found[-1][0]:
            break
        else:
            while len(found) > 1 and slope(found[-2], found[-1]) >= slope(found[-1], point):
                found.pop()
            found.append(point)
    return found


def slope(a: Point, b: Point) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else -math.inf


def together(hulls: Sequence[Sequence[Point]]) -> list[Point]:
    """Return the hull of the sums: the steps of all hulls, steepest first."""
    price, harm = (sum(found[0][k] for found in hulls) for k in (0, 1))
    steps = [
        (slope(a, b), b[0] - a[0], b[1] - a[1]) for h in hulls for a, b in itertools.pairwise(h)
    ]
    points = [(price, harm)]
    for _, dearer, change in sorted(steps):
        price, harm = price + dearer, harm + change
        points.append((price, harm))
    return points


def at(points: Sequence[Point], price: float) -> float:
    """Return the harm at a price, on the line between the points beside it."""
    for a, b in itertools.pairwise(points):
        if a[0] <= price <= b[0]:
            return a[1] + slope(a, b) * (price - a[0])
    return math.nan


def least_harm(rows: Sequence[dict[str, Any]], extra: str | None, share: float) -> float:
    """Return the least harm of a block at a share of its parameters, with a structure added."""
    matrices: dict[str, list[Point]] = defaultdict(list)
    joint: dict[str, list[Point]] = defaultdict(list)
    members: dict[str, list[str]] = {}
    size = 0.0
    for row in rows:
        if "curve" in row and len(row["members"]) == 1:
            matrices[row["target"]] += [*map(tuple, row["curve"]), (row["size"], 0.0)]
            size += row["size"]
        elif "curve" in row:
            joint[row["target"]] += map(tuple, row["curve"])
            members[row["target"]] = row["members"]
        elif row["structure"] == extra and "harm" in row:
            matrices[row["target"]].append((row["params"], row["harm"]))
    units, taken = [], set[str]()
    for name, points in joint.items():
        apart = together([hull(matrices[each]) for each in members[name] if each in matrices])
        units.append(hull([*apart, *points]))
        taken |= set(members[name])
    units += [hull(points) for name, points in matrices.items() if name not in taken]
    return at(together(units), share * size)


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield lines of both tables."""
    shares = sorted({row["share"] for row in rows} - {0.0})
    curves = {
        row["target"]: hull([*map(tuple, row["curve"]), (row["size"], 0.0)])
        for row in rows
        if row["structure"] == "low-rank"
    }
    found = defaultdict(list)
    for row in rows:
        if "harm" in row and row["harm"] > 0:
            found[row["structure"], row["share"]].append(
                row["harm"] / at(curves[row["target"]], row["params"])
            )
    yield "harm / harm of low rank at the same parameters: least, geometric mean"
    for name in NAMES:
        cells = [found[name, share] for share in shares]
        yield (
            f"| {name} | "
            + " | ".join(
                f"{min(c):.2f}, {math.exp(sum(map(math.log, c)) / len(c)):.2f}" if c else ""
                for c in cells
            )
            + " |"
        )
    yield "least harm of a block with one more structure on the hull / without: the blocks in turn"
    blocks = defaultdict(list)
    for row in rows:
        blocks[next(part for part in row["target"].split(".") if part.isdigit())].append(row)
    for name in NAMES:
        yield (
            f"| {name} | "
            + " | ".join(
                ", ".join(
                    f"{least_harm(b, name, share) / least_harm(b, None, share):.3f}"
                    for b in blocks.values()
                )
                for share in shares
            )
            + " |"
        )
