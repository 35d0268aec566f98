"""Pages written at build time: one for each scheme and each package, so that none is forgotten."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from pathlib import Path

from costs import cost
from diagrams import EXAMPLES as PICTURES
from diagrams import describe, example
from measured import headline, measured
from sizes import sizes_table

import tnlm
from tnlm.decompositions import formats
from tnlm.schemes import schemes
from tnlm.schemes.base import Scheme

DOCS = Path(__file__).parent
EXAMPLES = DOCS.parent / "examples"

PACKAGES = {
    "tnlm.allocation": "Allocation",
    "tnlm.calibration": "Calibration",
    "tnlm.checkpoint": "Checkpoints",
    "tnlm.checkpoint.kinds": "Kinds of entries",
    "tnlm.cli": "Command line",
    "tnlm.compression": "Compression",
    "tnlm.compression.gatherers": "Ways to gather statistics",
    "tnlm.decompositions": "Formats",
    "tnlm.evaluation": "Evaluation",
    "tnlm.evaluation.tasks": "Benchmarks",
    "tnlm.layers": "Layers",
    "tnlm.metrics": "Metrics",
    "tnlm.metrics.named": "Named metrics",
    "tnlm.parallel": "Several processes",
    "tnlm.plans": "Plans and reports",
    "tnlm.precision": "Bits: grids, rounding, packing",
    "tnlm.recovery": "Recovery",
    "tnlm.recovery.kinds": "Named recoveries",
    "tnlm.recovery.pruning": "Pruning",
    "tnlm.runtimes": "Runtimes",
    "tnlm.schemes": "Schemes",
    "tnlm.streaming": "Larger than memory",
    "tnlm.studies": "Studies",
    "tnlm.studies.analysis": "Analysis",
    "tnlm.studies.design": "Design space",
    "tnlm.studies.level_search": "Level search",
    "tnlm.studies.page": "The page about a model",
    "tnlm.studies.rank_search": "Rank search",
    "tnlm.targets": "Targets",
    "tnlm.tensors": "Tensors",
    "tnlm.utils": "Utilities",
}
"""Packages that have a page of their own in the reference, with its title."""


def write_if_new(path: Path, text: str) -> None:
    """Write a file unless it says so already, so that a build redoes no more than it must."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def scheme_table(found: Mapping[str, Scheme]) -> str:
    """Return all schemes as a table that links to their pages."""
    lines = ["| scheme | what it does | formats | metric | needs |", "|---|---|---|---|---|"]
    for name, scheme in found.items():
        link = f"[`{name}`](/_generated/schemes/{name}.md)"
        cells = [link, scheme.title, " or ".join(scheme.formats), scheme.metric, scheme.needs]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def scheme_page(scheme: Scheme) -> str:
    """Return a scheme's page: choices, its prose if there is, figures, costs, networks."""
    parts = [f"# {scheme.name}", scheme.title[0].upper() + scheme.title[1:] + "."]
    parts.append("\n".join(["| choice | value |", "|---|---|", *_choices(scheme)]))
    parts.append(f"```python\n{_call(scheme)}\n```")
    if (DOCS / "schemes" / f"{scheme.name}.md").is_file():
        parts.append(f"```{{include}} ../../schemes/{scheme.name}.md\n```")
    figures = measured(scheme.name)
    if figures:
        parts += ["## Measured", *figures]
    parts += ["## What it takes", *cost(scheme)]
    if scheme.formats:  # else the matrices keep their shapes
        parts += ["## Structure", *(_structure(name) for name in scheme.formats)]
    return "\n\n".join(parts) + "\n"


def api_page(package: str, title: str) -> str:
    """Return the reference of a package: everything public in every module of it."""
    lines = [f"# {title}", "```{eval-rst}", f".. automodule:: {package}"]
    root = importlib.import_module(package)
    defined_here = [name for name in public_names(package) if name not in tnlm.__all__]
    if defined_here:
        lines.append("   :members: " + ", ".join(defined_here))
    lines.append("```")
    for info in pkgutil.iter_modules(root.__path__, package + "."):
        if info.name in PACKAGES:  # it has a page of its own
            continue
        names = [name for name in public_names(info.name) if name not in tnlm.__all__]
        if names:
            lines += [f"## `{info.name}`", "```{eval-rst}", f".. automodule:: {info.name}"]
            lines += ["   :members: " + ", ".join(names), "   :show-inheritance:", "```"]
    return "\n".join(lines) + "\n"


def public_names(module: str) -> list[str]:
    """Return the functions and classes that a module defines itself, without private ones."""
    found = vars(importlib.import_module(module)).items()
    return [
        name
        for name, value in found
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module
    ]


def examples_page(folder: Path) -> str:
    """Return the page of examples: the gallery, or the scripts as they are if there is none."""
    if (folder / "README.rst").is_file():
        return "# Examples\n\n```{toctree}\n:maxdepth: 2\n\ngallery/index\n```\n"
    lines = ["# Examples"]
    for script in sorted(folder.glob("*.py")):
        lines += [f"## {script.name}", f"```{{literalinclude}} ../../examples/{script.name}\n```"]
    return "\n\n".join(lines) + "\n"


def write_pages(folder: Path) -> None:
    """Write all generated text into a folder."""
    write_if_new(folder / "examples.md", examples_page(EXAMPLES))
    write_if_new(folder / "sizes.md", sizes_table())
    write_if_new(folder / "headline.md", headline())
    found = schemes()
    write_if_new(folder / "schemes.md", scheme_table(found))
    for name, scheme in found.items():
        write_if_new(folder / "schemes" / f"{name}.md", scheme_page(scheme))
    for package, title in PACKAGES.items():
        write_if_new(folder / "api" / f"{package}.md", api_page(package, title))


def _call(scheme: Scheme) -> str:
    if not scheme.needs_calibration:
        return f'model = tnlm.compress(model, "{scheme.name}")'
    return (
        "model = tnlm.compress(\n"
        f'    model, "{scheme.name}", calibration="text.txt", tokenizer=tokenizer\n'
        ")"
    )


def _choices(scheme: Scheme) -> list[str]:
    targets = scheme.targets if isinstance(scheme.targets, list | tuple) else [scheme.targets]
    values = {
        "format": " or ".join(f"`{name}`" for name in scheme.formats) or "as they are",
        "metric": f"`{scheme.metric}`",
        "allocation": f"`{scheme.allocation}`",
        "cascade": f"`{scheme.cascade}`",
        "refinement": f"{scheme.refine_passes} passes" if scheme.refine_passes else "`none`",
        "recovery": f"`{scheme.recover}`",
        "targets": " and ".join(f"`{target}`" for target in targets),
        "kept by default": _kept(scheme),
        "needs": scheme.needs,
        "source": scheme.source,
    }
    if scheme.precision:
        values["bits"] = f"`{scheme.precision}`"
    if scheme.share > 1:
        values["blocks that share an input factor"] = str(scheme.share)
    if scheme.defaults:
        values["options"] = ", ".join(f"`{k}={v}`" for k, v in scheme.defaults.items())
    return [f"| {choice} | {value} |" for choice, value in values.items()]


def _kept(scheme: Scheme) -> str:
    if not scheme.formats:
        return "all parameters, in fewer bits"
    unit = "bytes" if scheme.unit == "bytes" else "parameters"
    return f"{scheme.keep_targets:g} of the targets' {unit}"


def _structure(name: str) -> str:
    title = formats()[name].title
    text = f"**{name}**: {title}."
    if name not in PICTURES:
        return text
    network = example(name)
    return (
        f"{text}\n\n```{{image}} ../diagrams/{name}.svg\n:alt: {name}\n```\n\n`{describe(network)}`"
    )
