"""Models whose weights accelerate keeps elsewhere: on disk, or spread over devices."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.errors import ModelError, TargetError

ON_DISK = {
    "model.embed_tokens": "disk",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "disk",
}
IDS = torch.arange(60).reshape(2, 30)
SCHEMES = ["svd", "kron", "tt", "btt", "tensorgpt", "kngpt2"]

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")


@pytest.fixture(params=SCHEMES)
def saved(request, compressed, tmp_path):
    """A compressed model, and where it is saved."""
    model = compressed("llama", request.param, keep_targets=0.5)
    return model, tnlm.save(model, tmp_path / "model")


def logits(model):
    """Logits of many tokens, for which weights may be rebuilt, and of one."""
    with torch.no_grad():
        return torch.cat([model(IDS).logits.flatten(), model(IDS[:1, :1]).logits.flatten()])


def test_a_compressed_model_runs_from_disk(saved, tmp_path):
    model, directory = saved
    loaded = tnlm.load(directory, device_map=ON_DISK, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in loaded.parameters())
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_compressed_model_runs_offloaded_to_the_cpu(saved):
    model, directory = saved
    loaded = cpu_offload(AutoModelForCausalLM.from_pretrained(directory), execution_device="cpu")
    torch.testing.assert_close(logits(loaded), logits(model))


def test_a_compressed_model_is_dispatched(saved):
    model, directory = saved
    places = dict.fromkeys(ON_DISK, "cpu")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    dispatched = dispatch_model(loaded, places, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(logits(dispatched), logits(model))


def test_weights_that_no_hook_brings_are_refused(tiny_llama):
    model = cpu_offload(tnlm.compress(tiny_llama(), "tt"), execution_device="cpu")
    for module in model.modules():
        if hasattr(module, "_hf_hook"):
            add_hook_to_module(module, ModelHook(), append=True)  # hides the hook that brings them
    with pytest.raises(ModelError, match="weights of a layer are offloaded"):
        logits(model)


def test_an_offloaded_compressed_model_is_not_made_dense(tiny_llama, tmp_path):
    model = tnlm.compress(tiny_llama(), "svd", keep_targets=0.5)
    tnlm.save(model, tmp_path / "model")
    loaded = tnlm.load(tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload")
    with pytest.raises(ModelError, match=r"offloaded.* load it without device_map"):
        tnlm.to_dense(loaded)


def test_an_offloaded_dense_model_is_not_compressed(tiny_llama, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload"
    )
    before = logits(model)
    with pytest.raises(TargetError, match="compress before dispatching"):
        tnlm.compress(model, "svd", keep_targets=0.5)
    torch.testing.assert_close(logits(model), before)
