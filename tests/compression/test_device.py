"""A model is compressed on the device where it is."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tests.mixtures import make
from tests.second_device import second_device

DATA = {"calibration": torch.arange(64) % 61 + 3, "max_length": 16, "gradient_samples": 2}
pytestmark = pytest.mark.filterwarnings("ignore:at..frobenius_norm:UserWarning")
CASES = [
    ("svd-llm", DATA),
    ("aa-svd", {**DATA, "refine_passes": 1}),
    ("auto", DATA),
    *(
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (
            ("svd", {}),
            ("btt", {}),
            ("fwsvd", DATA),
            ("modegpt", DATA),
            ("svd-llm", {**DATA, "refine": 32}),
            ("svd-llm", {**DATA, "recover": "lora", "recover_tokens": 64}),
        )
    ),
]


def errors(model, device, scheme, choices):
    """Compress a model on a device; return the measured errors."""
    model = model.to(device)
    tnlm.compress(model, scheme, keep_targets=0.7, progress=False, **choices)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {device.type}
    return {layer.name: layer.error or 0.0 for layer in tnlm.report(model).plan.layers}


@pytest.mark.parametrize(("scheme", "choices"), CASES)
def test_a_second_device_fits_as_the_first(scheme, choices, tiny_llama):
    expected = errors(tiny_llama(), torch.device("cpu"), scheme, choices)
    with second_device() as device:
        found = errors(tiny_llama(), device, scheme, choices)
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "choices"), CASES)
def test_a_gpu_fits_as_the_cpu(scheme, choices, tiny_llama):
    expected = errors(tiny_llama(), torch.device("cpu"), scheme, choices)
    found = errors(tiny_llama(), torch.device("cuda"), scheme, choices)
    assert found == pytest.approx(expected, rel=1e-2, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["svd-llm", "auto", "reap"])
def test_experts_are_fitted_there_as_well(scheme):
    def run(device):
        model = make("Mixtral")
        model.config._experts_implementation = "eager"
        size = {} if scheme == "reap" else {"keep_targets": 0.7}
        return tnlm.compress(model.to(device), scheme, progress=False, **size, **DATA)

    expected = run("cpu").state_dict()
    with second_device() as device:
        found = {name: tensor.cpu() for name, tensor in run(device).state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-3, atol=1e-3), name


def test_tensors_of_two_devices_do_not_mix():
    with second_device() as device:
        there = torch.ones(2, 3, device=device)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(2, 3)
        assert torch.equal((there + there).cpu(), torch.full((2, 3), 2.0))
