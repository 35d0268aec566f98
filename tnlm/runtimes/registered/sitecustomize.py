"""Python runs this file when it starts, if its folder is on PYTHONPATH: tnlm is registered."""

import importlib.util
import sys
from pathlib import Path

import tnlm  # noqa: F401  registers with transformers when that is imported

_own = str(Path(__file__).parent)
_elsewhere = [path for path in sys.path if path != _own]
_found = importlib.machinery.PathFinder.find_spec("sitecustomize", _elsewhere)
if _found is not None and _found.loader is not None:  # the environment's own is run as well
    _found.loader.exec_module(importlib.util.module_from_spec(_found))
