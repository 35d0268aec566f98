from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tnlm

HEAVY = [
    "datasets",
    "gguf",
    "lm_eval",
    "matplotlib",
    "opt_einsum",
    "optuna",
    "pandas",
    "peft",
    "rich",
    "scipy",
    "sklearn",
    "tensorly",
    "torch",
    "transformers",
    "typer",
]


def run(script):
    """Run a script in a new Python, where nothing is imported yet."""
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_loads_nothing_heavy():
    script = f"import sys, tnlm; print([m for m in {HEAVY} if m in sys.modules])"
    assert run(script) == "[]\n"


REGISTERED = """
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING as configs, AUTO_QUANTIZER_MAPPING as quantizers
)
assert "tnlm" in configs and "tnlm" in quantizers
"""
COMPRESS = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
             num_attention_heads=2)
tnlm.compress(LlamaForCausalLM(LlamaConfig(**sizes)), "svd", rank=2, progress=False)
unused = ["datasets", "gguf", "matplotlib", "peft", "rich", "tensorly", "typer", "tnlm.evaluation"]
found = [name for name in unused if name in sys.modules]
assert not found, found
"""


@pytest.mark.slow  # they load torch and transformers anew
@pytest.mark.parametrize(
    "script",
    [
        "import tnlm; from transformers import AutoModelForCausalLM, PreTrainedModel",
        "from transformers import PreTrainedModel; import tnlm",
    ],
)
def test_either_order_of_imports_registers_the_quantizer_and_nothing_unused(script):
    run(script + REGISTERED + COMPRESS)


@pytest.mark.parametrize("name", tnlm.__all__)
def test_public_names_resolve(name):
    found = getattr(tnlm, name)
    assert found.__doc__
    assert found.__module__.startswith("tnlm")
    assert found.__name__ == name


def test_all_is_what_is_public():
    assert set(tnlm.__all__) == set(tnlm._HOMES) <= set(dir(tnlm))


def test_type_checkers_find_every_name_in_its_home():
    imports = [node for node in ast.walk(ast.parse(Path(tnlm.__file__).read_text()))
               if isinstance(node, ast.ImportFrom) and node.module.startswith("tnlm.")]  # fmt: skip
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert seen == tnlm._HOMES


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'tnlm' has no attribute 'compres'"):
        tnlm.compres  # noqa: B018
