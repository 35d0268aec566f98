"""The site's versions: what the switcher offers, and where the first page leads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
URL = "https://docs.example/tnlm"


@pytest.fixture
def publish(tmp_path):
    """Make a site of the directories named, and return what is written."""

    def run(*names):
        site = tmp_path / "site"
        for name in names:
            (site / name / "_static").mkdir(parents=True, exist_ok=True)
            (site / name / "index.html").write_text(name)
        command = [sys.executable, str(ROOT / "docs" / "versions.py"), str(site), f"{URL}/"]
        subprocess.run(command, check=True)
        return site, json.loads((site / "switcher.json").read_text())

    return run


def test_without_a_release_all_leads_to_dev(publish):
    site, found = publish("dev")
    assert found == [{"name": "dev", "version": "dev", "url": f"{URL}/dev/"}]
    assert "url=dev/" in (site / "index.html").read_text()
    assert not (site / "stable").exists()
    assert (site / ".nojekyll").is_file()


def test_versions_are_in_order_and_the_newest_is_stable(publish):
    site, found = publish("dev", "0.9.0", "0.10.0", "_static", "v1", "notes")
    assert [entry["version"] for entry in found] == ["dev", "0.10.0", "0.9.0"]
    assert [entry["name"] for entry in found] == ["dev", "0.10.0 (stable)", "0.9.0"]
    assert [entry.get("preferred", False) for entry in found] == [False, True, False]
    assert found[1]["url"] == f"{URL}/stable/"
    assert (site / "stable" / "index.html").read_text() == "0.10.0"
    assert "url=stable/" in (site / "index.html").read_text()


def test_a_trial_release_does_not_take_the_place_of_a_final_one(publish):
    site, found = publish("0.1.0", "0.2.0rc1")
    assert [entry["version"] for entry in found] == ["0.1.0", "0.2.0rc1"]
    assert (site / "stable" / "index.html").read_text() == "0.1.0"


def test_a_trial_release_alone_is_not_stable(publish):
    site, found = publish("0.1.0rc1")
    assert [entry["name"] for entry in found] == ["0.1.0rc1"]
    assert not (site / "stable").exists()
    assert "url=0.1.0rc1/" in (site / "index.html").read_text()
    site, _ = publish("dev")
    assert "url=dev/" in (site / "index.html").read_text()


def test_stable_is_replaced_by_the_next_release(publish):
    publish("0.1.0")
    (old := publish("0.1.0")[0] / "stable" / "old.html").touch()
    site, _ = publish("0.1.0", "0.2.0")
    assert not old.exists()
    assert (site / "stable" / "index.html").read_text() == "0.2.0"


def step(job, name):
    """Return the commands of a step of the workflow."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/docs.yml").read_text())["jobs"]
    return next(step["run"] for step in jobs[job]["steps"] if step.get("name") == name)


def bash(script, cwd, **variables):
    words = ["bash", "-eo", "pipefail", "-c", script]
    subprocess.run(words, cwd=cwd, env=os.environ | variables, check=True)


REFS = {
    "dev": {"GITHUB_REF_TYPE": "branch", "GITHUB_REF_NAME": "main"},
    "0.1.0": {"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v0.1.0"},
    "0.2.0rc1": {"GITHUB_REF_TYPE": "tag", "GITHUB_REF_NAME": "v0.2.0-rc1"},
}
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize("version", REFS)
def test_the_workflow_tells_the_version(version, tmp_path):
    script = step("build", "A tag is a version, all else is dev")
    files = {name: str(tmp_path / name) for name in ("GITHUB_ENV", "GITHUB_OUTPUT")}
    bash(script, tmp_path, PATH=PATH, **files, **REFS[version])
    assert Path(files["GITHUB_ENV"]).read_text() == f"TNLM_DOCS_VERSION={version}\n"
    assert Path(files["GITHUB_OUTPUT"]).read_text() == f"version={version}\n"


def git(*words, cwd, fails=False):
    who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", *who, *words], cwd=cwd, check=not fails, capture_output=True)
    return done.stdout.decode()


def test_the_workflow_publishes_to_a_branch(tmp_path):
    """The step as it is written, on a repository that has no gh-pages yet, then one that has."""
    git("init", "-q", "--bare", "origin.git", cwd=tmp_path)
    git("clone", "-q", "origin.git", "work", cwd=tmp_path)
    work = tmp_path / "work"
    (work / "docs").mkdir()
    (work / "docs" / "versions.py").write_text((ROOT / "docs" / "versions.py").read_text())
    git("add", ".", cwd=work)
    git("commit", "-qm", "first", cwd=work)
    git("push", "-q", "origin", "HEAD:main", cwd=work)
    for version in ("dev", "0.1.0", "dev"):
        html = work / "docs" / "_build" / "html"
        html.mkdir(parents=True, exist_ok=True)
        (html / "index.html").write_text(f"{version} page")
        script = step("publish", "Put the pages on gh-pages")
        bash(script, work, PATH=PATH, TNLM_DOCS_URL=URL, VERSION=version)
        git("worktree", "remove", "--force", "site", cwd=work)
        git("branch", "-D", "gh-pages", cwd=work, fails=True)  # the next checkout is fresh
    names = git("ls-tree", "-r", "--name-only", "gh-pages", cwd=tmp_path / "origin.git").split()
    assert sorted(names) == [
        ".nojekyll",
        "0.1.0/index.html",
        "dev/index.html",
        "index.html",
        "stable/index.html",
        "switcher.json",
    ]
    page = git("show", "gh-pages:stable/index.html", cwd=tmp_path / "origin.git")
    assert page == "0.1.0 page"
    # The second build of dev changed nothing, so that there was nothing to commit.
    assert git("rev-list", "--count", "gh-pages", cwd=tmp_path / "origin.git").strip() == "2"
