from __future__ import annotations

import os
import subprocess
import sys

import pytest

import tnlm
from tnlm.errors import OptionError
from tnlm.runtimes.run import registered, run

LOAD = (
    "import sys; from transformers import AutoModelForCausalLM\n"
    "print(AutoModelForCausalLM.from_pretrained(sys.argv[1]).num_parameters())\n"
)


def test_a_program_that_does_not_import_tnlm_loads_a_compressed_model(tiny_llama, tmp_path):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.5, progress=False)
    tnlm.save(model, tmp_path / "model")
    command = [sys.executable, "-c", LOAD, str(tmp_path / "model")]
    found = subprocess.run(
        [sys.executable, "-m", "tnlm", "run", "--", *command],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(found.stdout) == model.num_parameters()


def test_an_environment_with_a_sitecustomize_keeps_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('mine')\n")
    environment = registered({**os.environ, "PYTHONPATH": str(tmp_path)})
    script = "import sys; print('tnlm' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["mine", "True"]


@pytest.mark.parametrize("command", [["no-such-program-here"], []])
def test_a_program_that_is_not_there(command):
    with pytest.raises(OptionError, match="is not on PATH; give a command"):
        run(command)
