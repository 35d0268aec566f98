"""Tables of what works with which family, from the rows of the checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import transformers
from family_checks import ALL_SAID, KEEP, SCHEMES, TOLERANCE, Row
from timing import table

HEAD = ["family", "class", "reads", "body", "targets", *SCHEMES, "left in the body, and around"]
INTRO = """# Families of models

What works with which family of transformers {version}: {count} families, each as a tiny model with
random weights, under {schemes} schemes. {passing} pass every check under all of them. Made by
`python benchmarks/families.py`; with names, as in `python benchmarks/families.py llama bert`, it
runs those alone, and what was run is not run again.

The checks, at {keep} of the targets' parameters and calibrated on two random rows:

- it **compresses**;
- **listed**: {listed};
- **counts**: the report counts the parameters that the model has;
- **reproducible**: outputs are finite, and the same twice;
- **loads**: `tnlm.load` and the Auto class give what was saved, bit for bit, and the same outputs;
- **dense**: `to_dense` gives the same outputs, but for rounding, to {tolerance:g} of their norm;
- **trains**: a backward pass gives finite gradients;
- **generates**, where the dense model does.

A cell names the checks that fail; the reasons are below. *Body* counts the parameters of two
or more dimensions in the blocks, without embeddings and heads; *targets* is the part of them that
`svd` chooses. Towers that the input does not reach stay dense under the schemes that need data.
"""


def totals(rows: Sequence[Row]) -> dict[str, Any]:
    """Return one entry a family: what is compressed, what is left, and what each scheme says."""
    found = [_family(own) for own in _by_family(rows).values()]
    made = [each for each in found if each["parameters"]]
    whole = [each for each in made if all(each["schemes"].get(s) == "passes" for s in SCHEMES)]
    return {
        "transformers": transformers.__version__,
        "families": len(made),
        "passing": len(whole),
        "checks": sum(len(row.checks) for row in rows if row.params),
        "without_reason": sorted({row.family for row in rows if row.params and not row.says_why}),
        "rows": made,
        "not_made": {each["family"]: next(iter(each["schemes"].values())).get("runs", "")
                     for each in found if not each["parameters"]},
    }  # fmt: skip


def _by_family(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.family, []).append(row)
    return found


def _family(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the entry of one family."""
    first = next((row for row in rows if row.share is not None), rows[0])
    left: Counter[str] = Counter()
    for kind, _, params, _, in_body in first.left:
        left[kind if in_body else f"{kind}, around"] += params
    return {
        "family": first.family,
        "class": first.cls,
        "reads": first.modality,
        "parameters": max(row.params for row in rows),
        "body": first.body,
        "targets": first.share,
        "mixture": first.mixture,
        "left": dict(left.most_common()),
        "schemes": {row.scheme: _said(row) for row in rows},
    }


def _said(row: Row) -> Any:
    if row.passes:
        return "passes"
    return {name: said for name, said in row.checks.items() if said not in (True, None)}


def as_text(found: dict[str, Any]) -> str:
    """Return the page: the table, then what fails with its reason."""
    intro = INTRO.format(
        version=found["transformers"],
        count=found["families"],
        schemes=len(SCHEMES),
        passing=found["passing"],
        keep=KEEP,
        listed=ALL_SAID,
        tolerance=TOLERANCE,
    )
    cells = [_cells(each) for each in found["rows"]]
    return f"{intro}\n{table(HEAD, cells)}\n\n{_reasons(found['rows'])}{_missing(found)}"


def _cells(each: dict[str, Any]) -> list[str]:
    marks = [_mark(each["schemes"].get(scheme)) for scheme in SCHEMES]
    share = "" if each["targets"] is None else f"{each['targets']:.2f}"
    left = ", ".join(f"{kind} {params:,}" for kind, params in each["left"].items())
    body = f"{each['body']:,}"
    reads = f"{each['reads']}, experts" if each["mixture"] else each["reads"]
    return [f"`{each['family']}`", each["class"], reads, body, share, *marks, left]


def _mark(said: Any) -> str:
    if said is None:
        return ""
    return "yes" if said == "passes" else f"**{', '.join(said)}**"


def _reasons(found: Sequence[dict[str, Any]]) -> str:
    """Return what fails; schemes and families of one reason stand together."""
    reasons: dict[tuple[str, str], dict[str, list[str]]] = {}
    for each in found:
        for scheme, said in each["schemes"].items():
            for name, text in said.items() if said != "passes" else ():
                where = reasons.setdefault((name, _short(text)), {})
                where.setdefault(each["family"], []).append(scheme)
    if not reasons:
        return ""
    lines = [
        f"- **{name}**: "
        + "; ".join(f"`{family}` ({', '.join(schemes)})" for family, schemes in where.items())
        + f": {text}"
        for (name, text), where in reasons.items()
    ]
    return "\n".join(["## What fails, and why", "", *lines, ""])


def _missing(found: dict[str, Any]) -> str:
    if not found["not_made"]:
        return ""
    names = ", ".join(f"`{family}`" for family in found["not_made"])
    return (
        "\n## Not in the table\n\nFor these families the script cannot build a tiny model or an "
        f"input, or a package is missing (`families.json` gives the reason): {names}.\n"
    )


def _short(text: str) -> str:
    """Return an error in a line that Markdown leaves as it is."""
    line = " ".join(str(text).split())
    return line.replace("|", "/").replace("*", "\\*").replace("<", "\\<")[:300]
