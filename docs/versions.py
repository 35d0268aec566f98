"""Writes what lets a reader choose a version: switcher.json, and a first page that leads on.

The published site is a folder with one directory a version: ``dev``, ``0.1.0``, ... and ``stable``,
a copy of the newest release.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from packaging.version import InvalidVersion, Version

DEV, STABLE = "dev", "stable"


def releases(site: Path) -> list[Version]:
    """Return the versions that a site holds, newest first; final ones before trial ones.

    Example:
        >>> releases(Path("/no/such/site"))
        []
    """
    found = []
    for folder in site.glob("*"):
        try:
            version = Version(folder.name)
        except InvalidVersion:
            continue
        if folder.is_dir() and folder.name == str(version):
            found.append(version)
    return sorted(found, key=lambda version: (not version.is_prerelease, version), reverse=True)


def stable(site: Path) -> Version | None:
    """Return the newest final release that a site holds."""
    return next((version for version in releases(site) if not version.is_prerelease), None)


def entries(site: Path, url: str) -> list[dict[str, object]]:
    """Return the switcher's lines for the directories that exist.

    Args:
        site: the folder of the whole site.
        url: its address, without a slash at the end.
    """
    newest = stable(site)
    found: list[dict[str, object]] = []
    if (site / DEV).is_dir():
        found.append({"name": DEV, "version": DEV, "url": f"{url}/{DEV}/"})
    for version in releases(site):
        entry: dict[str, object] = {"name": f"{version}", "version": f"{version}"}
        if version == newest:
            entry |= {"name": f"{version} (stable)", "url": f"{url}/{STABLE}/", "preferred": True}
        found.append({"url": f"{url}/{version}/"} | entry)
    return found


def first_page(target: str) -> str:
    """Return a page that leads to a directory.

    Example:
        >>> "url=stable/" in first_page("stable")
        True
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>tnlm</title>
<meta http-equiv="refresh" content="0; url={target}/">
<link rel="canonical" href="{target}/">
</head>
<body><a href="{target}/">tnlm's documentation</a></body>
</html>
"""


def write(site: Path, url: str) -> None:
    """Bring ``stable``, switcher.json and index.html up to date with the directories."""
    newest = stable(site)
    if newest is not None:
        shutil.rmtree(site / STABLE, ignore_errors=True)
        shutil.copytree(site / str(newest), site / STABLE)
    found = entries(site, url.rstrip("/"))
    (site / "switcher.json").write_text(json.dumps(found, indent=1) + "\n")
    first = next((name for name in (STABLE, DEV) if (site / name).is_dir()), None)
    (site / "index.html").write_text(first_page(first or str(releases(site)[0])))
    (site / ".nojekyll").touch()  # directories that begin with _ are served as they are


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Write the version switcher of a site.")
    parser.add_argument("site", type=Path, help="folder that holds one directory a version")
    parser.add_argument("url", help="address at which the folder will be read")
    given = parser.parse_args()
    write(given.site, given.url)


if __name__ == "__main__":
    main()
