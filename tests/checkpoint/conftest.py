"""A saved model, written once and copied for every test that changes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tnlm


@pytest.fixture(scope="session")
def saved_once(compressed, tmp_path_factory) -> Path:
    return tnlm.save(compressed("llama", "svd"), tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A directory with a low-rank Llama."""
    return Path(shutil.copytree(saved_once, tmp_path / "model"))
