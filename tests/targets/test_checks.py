"""What is no model, and what holds one; misspelt keywords; where gradients are off."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, pipeline

import tnlm
from tnlm.errors import ModelError, OptionError

IDS = torch.arange(64) % 61 + 3
LORA = peft.LoraConfig(target_modules=["q_proj"], r=2)


class Sentences(nn.Sequential):
    """As a SentenceTransformer holds its model."""


class Part(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.auto_model = model


HOLDERS = {
    "merge_and_unload": lambda model, _: peft.get_peft_model(model, LORA),
    "_orig_mod": lambda model, _: torch.compile(model),
    r"\.module": lambda model, _: nn.DataParallel(model),
    r"\.model": lambda model, tokenizer: pipeline(
        "text-generation", model=model, tokenizer=tokenizer, device="cpu"
    ),
    r"get_submodule\('0\.auto_model'\)": lambda model, _: Sentences(Part(model)),
    r"\.auto_model": lambda model, _: Part(model),
    r"load it first: .*from_pretrained": lambda *_: "my-model",
    "not dict": lambda model, _: model.state_dict() and {},
    "not Linear": lambda *_: nn.Linear(2, 2),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("message", HOLDERS)
def test_what_holds_a_model_is_told_how_to_give_it(message, tiny_llama, word_tokenizer):
    given = HOLDERS[message](tiny_llama(), word_tokenizer)
    for call in (tnlm.compress, tnlm.plan):
        with pytest.raises(ModelError, match=message):
            call(given, "svd")
    with pytest.raises(ModelError):
        tnlm.to_dense(given)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_adapters_and_compiled_parts_inside_are_named(tiny_llama):
    model = tiny_llama()
    peft.inject_adapter_in_model(LORA, model)
    with pytest.raises(ModelError, match=r"q_proj has a PEFT adapter.*merge_and_unload"):
        tnlm.compress(model, "svd")
    model = tiny_llama()
    model.model.layers[1].mlp = torch.compile(model.model.layers[1].mlp)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp is compiled.*_orig_mod"):
        tnlm.compress(model, "svd")


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("keep_target", "keep_targets"),
        ("metrics", "metric"),
        ("calibraton", "calibration"),
        ("tolerence", "tolerance"),
        ("target", "targets"),
        ("ranks", "rank"),
        ("gage", "gauge"),
    ],
)
def test_a_misspelt_keyword_is_recognised(word, meant, tiny_llama):
    for call in (tnlm.compress, tnlm.plan):
        with pytest.raises(OptionError, match=f"did you mean '{meant}'"):
            call(tiny_llama(), "svd", **{word: 1})


def test_a_misspelt_keyword_beside_a_plan_and_of_a_config(tiny_llama):
    decided = tnlm.plan(tiny_llama(), "svd", rank=4)
    with pytest.raises(OptionError, match="did you mean 'calibration'"):
        tnlm.compress(tiny_llama(), decided, calibraton=IDS)
    with pytest.raises(OptionError, match="did you mean 'keep_targets'"):
        tnlm.from_config(tiny_llama().config, "svd", keep_target=0.5)


def trains(model):
    model(input_ids=IDS[None, :8], labels=IDS[None, :8]).loss.backward()
    return all(p.requires_grad and p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("off", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("scheme", ["svd", "svd-llm", "albert"])
def test_a_model_made_where_gradients_are_off_trains(off, scheme, tiny_llama, tmp_path):
    model = tiny_llama()
    data = {"calibration": IDS, "max_length": 16} if scheme == "svd-llm" else {}
    with off():
        tnlm.compress(model, scheme, keep_targets=0.5, progress=False, **data)
        tnlm.save(model, tmp_path / "out")
        loaded = tnlm.load(tmp_path / "out")
    assert trains(model)
    assert trains(loaded)
    with off():
        dense = tnlm.to_dense(model)
        factored = tnlm.from_config(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=1), "svd")
    assert trains(dense)
    assert trains(factored)
    with off():
        tnlm.finetune(loaded, IDS, max_length=16, batch_size=2, progress=False)


def test_a_model_made_in_inference_mode_is_named(tiny_llama):
    with torch.inference_mode():
        model = tiny_llama()
        with pytest.raises(ModelError, match=r"inside torch\.inference_mode\(\).*outside of it"):
            tnlm.compress(model, "svd")
