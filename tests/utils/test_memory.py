"""Freed memory goes back to the system, without starting a process at every fit."""

from __future__ import annotations

import subprocess

from tnlm.utils.memory import release


def test_the_c_library_is_looked_for_once(monkeypatch):
    release()
    monkeypatch.setattr(subprocess, "Popen", None)
    release()
