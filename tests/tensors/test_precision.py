"""The report measures the factors as they are stored in half precision, and they are finite."""

from __future__ import annotations

import copy

import pytest
import torch

import tnlm
from tnlm.decompositions import get_format
from tnlm.errors import ModelError
from tnlm.tensors.network import Gauge, Network
from tnlm.tensors.precision import as_stored, rounded, widened

DATA = {"calibration": torch.arange(256) % 61 + 3, "max_length": 32, "progress": False}
HALF = [torch.float16, torch.bfloat16]


def net(gauge=False):
    sizes = {"o": 6, "a": 2, "i": 5}
    fixed = Gauge("left", "a") if gauge else None
    return Network({"left": "oa", "right": "ai"}, "o", "i", sizes, fixed)


def test_scale_moves_between_factors_where_one_is_too_large(gaussian):
    factors = {"left": 1e6 * gaussian(6, 2), "right": 1e-4 * gaussian(2, 5)}
    stored = as_stored(net(), factors, torch.float16, "q_proj")
    assert all(factor.dtype == torch.float16 for factor in stored.values())
    product = stored["left"].double() @ stored["right"].double()
    wanted = factors["left"] @ factors["right"]
    torch.testing.assert_close(product, wanted, rtol=0, atol=2e-3 * float(wanted.abs().max()))


def test_what_fits_is_only_rounded(gaussian):
    factors = {"left": gaussian(4, 2), "right": gaussian(2, 5), "left_order": torch.arange(6)}
    stored = as_stored(net(gauge=True), factors, torch.float16, "q_proj")
    assert torch.equal(stored["left"], factors["left"].half())
    assert stored["left_order"].dtype == torch.int64


def test_what_cannot_be_stored_names_the_layer(gaussian):
    factors = {"left": gaussian(4, 2), "right": 1e6 * gaussian(2, 5)}
    with pytest.raises(
        ModelError, match=r"'right' of q_proj reaches .*e\+06, but the largest float16 is"
    ):
        as_stored(net(gauge=True), factors, torch.float16, "q_proj")
    with pytest.raises(ModelError, match="nothing"):
        rounded(torch.tensor([float("nan")]), torch.float32, "nothing")


def low_rank_llama(make_model, dtype):
    """A model whose matrices have rank 4: what a fit of that rank loses is rounding."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.copy_(torch.randn(48, 4) @ torch.randn(4, 32) / 8)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("gauge", [True, False])
def test_the_error_is_that_of_what_is_stored(dtype, gauge, make_model):
    torch.manual_seed(0)
    model = low_rank_llama(make_model, dtype)
    dense = copy.deepcopy(model)
    tnlm.compress(model, "svd", targets=["up_proj"], rank=6, gauge=gauge)
    for layer in tnlm.report(model).plan.layers:
        made = model.get_submodule(layer.name)
        stored = widened({k: v.detach() for k, v in made.factors().items()})
        full = stored
        weight = dense.get_submodule(layer.name).weight.double()
        error = (full["left"] @ full["right"] - weight.detach()).norm() / weight.detach().norm()
        assert layer.error == pytest.approx(float(error.detach()), rel=1e-6)
        assert layer.error > torch.finfo(dtype).eps / 100


def test_float32_reports_the_error_of_the_fit(make_model):
    model = low_rank_llama(make_model, torch.float32)
    tnlm.compress(model, "svd", targets=["up_proj"], rank=6)
    assert all(layer.error < 1e-6 for layer in tnlm.report(model).plan.layers)


@pytest.mark.parametrize("scheme", ["svd", "modegpt"])
def test_channels_and_ranks_tell_of_half_precision_alike(scheme, make_model):
    exact, half = (make_model("llama").to(dtype) for dtype in (torch.float32, torch.bfloat16))
    data = DATA if scheme == "modegpt" else {}
    for model in (exact, half):
        tnlm.compress(model, scheme, targets=r".*mlp.*", keep_targets=0.6, **data)
    errors = [[la.error for la in tnlm.report(m).plan.layers] for m in (exact, half)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
    assert errors[0] != errors[1]


def test_large_weights_fit_into_float16_by_their_scale(make_model):
    model = make_model("llama").half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.copy_(torch.randn(32, 1) @ torch.ones(1, 48) * 1.5e4)
    tnlm.compress(model, "svd", targets=["down_proj"], rank=4, gauge=False)
    assert all(layer.error < 0.01 for layer in tnlm.report(model).plan.layers)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "modegpt"])
def test_factors_that_overflow_name_the_layer_and_leave_the_model(scheme, make_model, monkeypatch):
    structure = get_format("channels" if scheme == "modegpt" else "low-rank")
    fit = type(structure).fit

    def huge(self, *given):
        return {k: v * 1e9 if v.is_floating_point() else v for k, v in fit(self, *given).items()}

    model = make_model("llama").half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(type(structure), "fit", huge)
    data = {} if scheme == "svd" else DATA
    with pytest.raises(ModelError, match=r"layers\.0\.mlp.* reaches .* the largest float16 is"):
        tnlm.compress(model, scheme, targets=r".*mlp.*", keep_targets=0.6, **data)
    assert not hasattr(model.config, "quantization_config")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
