"""LoRA by ordinary names on factorized layers; other libraries on their factors."""

from __future__ import annotations

import peft
import pytest
import torch

import tnlm
from tnlm.errors import ModelError, OptionError
from tnlm.layers.peft_names import adaptable

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
]

IDS = torch.arange(16)[None] + 3
CASES = [
    ("llama", "svd", ["q_proj", "v_proj"]),
    ("llama", "kron", ["q_proj", "down_proj"]),
    ("gpt2", "svd", ["c_attn", "c_fc"]),
    ("llama", "albert", ["embed_tokens", "q_proj"]),
    ("llama", "tensorgpt", ["embed_tokens"]),
]


def trained(model, names):
    """Return the model with a LoRA that does something."""
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, adaptable(peft.LoraConfig(target_modules=names, r=2)))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    return adapted.eval()


@pytest.mark.parametrize(("kind", "scheme", "names"), CASES)
def test_an_adapter_trains_is_saved_and_read(kind, scheme, names, compressed, tmp_path):
    model = compressed(kind, scheme, keep_targets=0.6)
    plain = model(IDS).logits
    adapted = trained(model, names)
    logits = adapted(IDS).logits
    assert not torch.allclose(logits, plain)
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name)
    adapted.save_pretrained(tmp_path)
    config = adaptable(peft.LoraConfig.from_pretrained(tmp_path))
    base = compressed(kind, scheme, keep_targets=0.6)
    again = peft.PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    assert torch.equal(again(IDS).logits, logits)


@pytest.mark.parametrize(("kind", "scheme", "names"), CASES)
def test_it_merges_into_the_dense_model_and_not_into_factors(
    kind, scheme, names, compressed, tmp_path
):
    adapted = trained(compressed(kind, scheme, keep_targets=0.6), names)
    logits = adapted(IDS).logits
    adapted.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"cannot be merged .* tnlm\.to_dense"):
        adapted.merge_and_unload()
    dense = tnlm.to_dense(compressed(kind, scheme, keep_targets=0.6))
    merged = peft.PeftModel.from_pretrained(dense, tmp_path).merge_and_unload().eval()
    torch.testing.assert_close(merged(IDS).logits, logits, atol=1e-4, rtol=1e-4)


def test_it_comes_off_again(compressed):
    model = compressed("llama", "svd", keep_targets=0.6)
    plain = model(IDS).logits
    assert torch.equal(trained(model, ["q_proj"]).unload()(IDS).logits, plain)


@pytest.mark.parametrize("kind", [peft.OFTConfig, peft.LoraConfig])
def test_adapters_go_on_factors_and_merge_there(kind, compressed):
    model = compressed("llama", "svd", rank=8)
    options = {"oft_block_size": 4} if kind is peft.OFTConfig else {"r": 2}
    if kind is peft.OFTConfig:
        with pytest.raises(OptionError, match="put other adapters on factors"):
            adaptable(kind(target_modules=["q_proj"], **options))
    adapted = peft.get_peft_model(model, kind(target_modules=["q_proj.left"], **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.05)
    logits = adapted.eval()(IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("scheme", ["svd", "kron", "tt", "tucker"])
def test_factors_are_quantized_dynamically(scheme, compressed):
    model = compressed("llama", scheme, keep_targets=0.6, max_macs=4.0)
    small = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        logits, exact = small(IDS).logits, model(IDS).logits
    assert 0 < float((logits - exact).norm() / exact.norm()) < 0.05
