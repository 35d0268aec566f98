"""Weights whose squares are no float32: the fit is the one of the same matrix at another scale."""

from __future__ import annotations

import pytest
import torch

import tnlm
from tnlm.schemes import schemes
from tnlm.tensors.symmetric import add_outer

FREE = [
    name for name, scheme in schemes().items() if not scheme.needs_calibration and scheme.formats
]
TABLES = ("albert", "tensorgpt")


@pytest.mark.parametrize("scale", [2.0**100, 2.0**-100])
@pytest.mark.parametrize("scheme", FREE)
def test_very_large_and_small_weights_are_fitted(scheme, scale, tiny_llama):
    def error(by):
        model = tiny_llama()
        names = ("embed_tokens",) if scheme in TABLES else ("up_proj",)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in names):
                    parameter.mul_(by)
        tnlm.compress(model, scheme, targets=list(names), keep_targets=0.5, progress=False)
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        return [layer.error for layer in tnlm.report(model).plan.layers]

    assert error(scale) == pytest.approx(error(1.0), rel=1e-5)


@pytest.mark.parametrize("scheme", ["svd-llm", "kron"])
def test_very_large_inputs_are_measured(scheme, tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e25)
    tnlm.compress(
        model,
        scheme,
        metric="input",
        targets=["layers.0.mlp.down_proj"],
        calibration=torch.arange(256) % 61 + 3,
        max_length=32,
        keep_targets=0.5,
        progress=False,
    )
    [layer] = tnlm.report(model).plan.layers
    assert 0 < layer.error < 1


def test_ordinary_products_are_in_float32(gaussian):
    rows = gaussian(8, 4).float()
    total = torch.zeros(4, 4, dtype=torch.float64)
    add_outer(total, rows)
    single = (rows.T @ rows).double().tril()  # rounded to a grid after that
    torch.testing.assert_close(total.tril(), single, rtol=0, atol=2e-6)
