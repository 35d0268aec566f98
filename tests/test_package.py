"""What a release holds, read from the files that say so: nothing is built."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import tnlm
from tnlm.schemes import schemes

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def citation():
    return yaml.safe_load((ROOT / "CITATION.cff").read_text())


def test_the_wheel_takes_the_package_with_all_its_files(project):
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["tnlm"]
    files = [path for path in (ROOT / "tnlm").rglob("*") if path.is_file()]
    others = {path.name for path in files if path.suffix not in (".py", ".pyc")}
    assert others == {"py.typed", "sort.js", "style.css"}  # the last two are of the page


def test_what_the_source_archive_names_is_there(project):
    for pattern in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert list(ROOT.glob(pattern.lstrip("/"))), pattern


def test_the_oldest_python_is_the_same_everywhere(project):
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {oldest}" in project["project"]["classifiers"]
    assert project["tool"]["mypy"]["python_version"] == oldest
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")


def test_ci_tests_every_python_that_is_claimed(project):
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    tested = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    claimed = re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))
    assert tested == claimed


def test_the_citation_names_this_version_and_licence(project, citation):
    assert citation["version"] == tnlm.__version__
    assert citation["license"] == project["project"]["license"]
    assert citation["authors"] == project["project"]["authors"]


def test_the_changelog_has_this_version_on_the_day_of_the_citation(citation):
    found = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert found[:2] == [("Unreleased", ""), (tnlm.__version__, str(citation["date-released"]))]


def test_every_reference_has_what_the_citation_format_asks_for(citation):
    for reference in citation["references"]:
        assert reference["type"] in {"article", "conference-paper"}
        assert reference["title"]
        assert isinstance(reference["year"], int)
        assert all("name" in person or "family-names" in person for person in reference["authors"])


@pytest.mark.parametrize("name", sorted(schemes()))
def test_the_paper_of_every_scheme_is_cited(name, citation):
    numbers = set(re.findall(r"\d{4}\.\d{5}", schemes()[name].source))
    cited = [r for r in citation["references"] if name in r["notes"].split(", ")]
    assert numbers <= set(re.findall(r"arXiv:(\d{4}\.\d{5})", str(citation["references"])))
    assert cited or schemes()[name].source.startswith("tnlm;")
