"""run: another Python program reads compressed models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from tnlm.errors import OptionError

REGISTERED = Path(__file__).parent / "registered"
"""Holds a ``sitecustomize`` that imports tnlm."""


def run(command: Sequence[str]) -> NoReturn:
    """Replace this process by a program in which tnlm is registered, and in all that it starts.

    Raises:
        OptionError: if there is no such program.
    """
    program = shutil.which(command[0]) if command else None
    if program is None:
        named = repr(command[0]) if command else "no program"
        raise OptionError(f"{named} is not on PATH; give a command, as in: tnlm run -- lm_eval")
    os.execve(program, list(command), registered(os.environ))


def registered(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose Python programs have tnlm registered.

    Example:
        >>> registered({"PYTHONPATH": "mine"})["PYTHONPATH"].split(os.pathsep)[1:]
        ['mine']
    """
    paths = [str(REGISTERED), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths)}
