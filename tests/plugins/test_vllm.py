"""The parts of the plug-in for vLLM that need no vLLM."""

from __future__ import annotations

import copy
import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import tnlm_vllm
import torch
from tnlm_vllm import chains, layout, loading, versions
from tnlm_vllm.layout import LayoutError, dense, read_layers
from tnlm_vllm.loading import Slots

import tnlm

STEP = {
    "tensor": "factor0",
    "rows": 4,
    "columns": 6,
    "blocks": 1,
    "permute": None,
    "rest": [],
    "after": [4],
    "identity": None,
    "int8": False,
}
LAYER = {"shape": [4, 6], "modes": [6], "steps": [STEP], "permute": None}


def config(**changes):
    said = {"runtime": "vllm", "layout": layout.LAYOUT, "layers": {"a.q_proj": LAYER}}
    return copy.deepcopy(said | changes)


@pytest.mark.parametrize("module", [layout, chains, loading, versions])
def test_examples(module):
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(module, optionflags=options)
    assert found.attempted
    assert not found.failed


def test_a_description_is_read():
    (layer,) = read_layers(config()).values()
    assert layer.shape == (4, 6)
    assert layer.tensors() == {"factor0": ((4, 6), "weight")}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime": None}, r"saved by tnlm, not exported for vLLM: run `tnlm export"),
        ({"layout": 2}, "has layout 2, and this tnlm-vllm reads 1"),
        ({"layers": {"a": {}}}, "broken quantization_config: KeyError"),
        ({"layers": {"a": LAYER | {"shape": [4, 7]}}}, r"make no \(4, 7\) matrix"),
        ({"layers": {"a": LAYER | {"steps": []}}}, r"make no \(4, 6\) matrix"),
        ({"layers": {"a": LAYER | {"permute": [1]}}}, r"make no \(4, 6\) matrix"),
    ],
)
def test_a_broken_description_is_refused(changes, message):
    with pytest.raises(LayoutError, match=message):
        read_layers(config(**changes))


@pytest.mark.parametrize(
    "change",
    [
        {"columns": 5},
        {"rows": 0},
        {"blocks": 3},
        {"permute": [1]},
        {"after": [5]},
        {"identity": "both"},
        {"identity": "out"},
        {"columns": 3, "blocks": 2, "int8": True},
    ],
)
def test_a_step_that_does_not_fit_is_refused(change):
    with pytest.raises(LayoutError, match="a step of a that does not fit"):
        read_layers(config(layers={"a": LAYER | {"steps": [STEP | change]}}))


def test_a_tensor_of_another_shape_is_refused():
    slots = Slots("qkv_proj", [dense((2, 3)), dense((1, 3))], torch.float32)
    weight = slots.parameters["weight"]
    with pytest.raises(LayoutError, match=r"qkv_proj: the files have weight \(1, 3\) for part 0"):
        weight.weight_loader(weight, torch.ones(1, 3), "q")
    with pytest.raises(LayoutError, match=r"for part 2, and config\.json none"):
        weight.weight_loader(weight, torch.ones(1, 3), "v")


def test_a_missing_tensor_is_named():
    slots = Slots("down_proj", [dense((2, 3))], torch.float32)
    with pytest.raises(LayoutError, match="down_proj: the files lack weight of part 0"):
        slots.check()
    slots.parameters["weight"].weight_loader(slots.parameters["weight"], torch.ones(2, 3))
    slots.check()


def test_it_takes_neither_tnlm_nor_transformers():
    code = "import sys, tnlm_vllm, tnlm_vllm.chains, tnlm_vllm.loading, tnlm_vllm.versions\n"
    code += "assert not {'tnlm', 'transformers', 'vllm'} & set(sys.modules), sys.modules"
    folder = Path(tnlm_vllm.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_it_has_the_version_of_tnlm():
    assert tnlm_vllm.__version__ == tnlm.__version__


def test_int8_in_float16_does_not_overflow():
    codes, scales = torch.full((2, 64), 127, dtype=torch.int8), torch.full((2,), 0.001)
    x = torch.full((3, 64), 20.0).half()
    found = chains.Int8Product(codes, scales.half())(x)
    torch.testing.assert_close(found.float(), torch.full((3, 2), 162.56), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("offset", [1, 8])
def test_int8_with_operands_that_start_anywhere(offset):
    """torch's kernel crashes on these."""
    torch.manual_seed(0)
    codes = torch.randint(-127, 128, (32 * 48 + offset,), dtype=torch.int8)[offset:].view(32, 48)
    scales = (torch.rand(32 + offset) / 100).bfloat16()[offset:]
    product = chains.Int8Product(codes, scales)
    wide, flat = torch.randn(4, 48 + offset).bfloat16(), torch.randn(48 + offset).bfloat16()
    for x in (wide[:, offset:], flat[offset:].view(1, 48)):
        expected = x.float() @ (codes * scales[:, None].float()).T
        torch.testing.assert_close(product(x).float(), expected, rtol=0.02, atol=0.02)
