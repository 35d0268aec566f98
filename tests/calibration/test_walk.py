from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PvtV2Config,
    PvtV2ForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
    XLMWithLMHeadModel,
)

from tnlm.calibration import walk
from tnlm.calibration.data import token_batches
from tnlm.calibration.walk import call_block, stream
from tnlm.targets.selection import select

BATCHES = token_batches(torch.arange(96) % 61 + 3, max_length=16, batch_size=2)
RAGGED = token_batches([[3, 4, 5, 6], [7, 8, 9], [10, 11]], batch_size=2)


class Shortcut(nn.Module):
    """A block that adds what the block before it has left aside, as in U-shaped models."""

    def __init__(self, block, aside):
        super().__init__()
        self.block, self.aside = block, aside

    def forward(self, hidden_states, **arguments):
        earlier = self.aside.pop() if self.aside else 0.0
        self.aside.extend([] if isinstance(earlier, torch.Tensor) else [hidden_states])
        return self.block(hidden_states + earlier, **arguments)


class Parts(nn.Module):
    """Holds a block in a list, and is called by name: no hook on an item of the list sees it."""

    def __init__(self, block):
        super().__init__()
        self.block = nn.ModuleList([block])

    def __call__(self, *args, **kwargs):
        return self.block[0](*args, **kwargs)


def modules_of(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


def rows_of(x):
    return x.reshape(-1, x.shape[-1]).clone()


def inputs(model, batches=BATCHES, modules=None):
    """The inputs that each module is shown, and whether any came with a mask."""
    seen, masks = {}, []

    def see(name, x, mask):
        seen.setdefault(name, []).append(rows_of(x))
        masks.append(mask)

    done = sum(stream(model, modules or modules_of(model), batches, see))
    return {name: torch.cat(parts) for name, parts in seen.items()}, masks, done


def whole_passes(model, modules=None):
    """What hooks see in ordinary forward passes, as the reference."""
    seen = {}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen.setdefault(name, []).append(rows_of(args[0]))
        )
        for name in modules or modules_of(model)
    ]
    with torch.no_grad():
        for batch in BATCHES:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.fixture
def walked(monkeypatch):
    """Count the blocks walked through."""
    counts = []
    real = walk._walk
    monkeypatch.setattr(walk, "_walk", lambda *args: counts.append(len(args[1])) or real(*args))
    return counts


def first_gpt():
    """Its blocks return lists."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "masked-bert", "openai-gpt"])
def test_walking_shows_what_whole_passes_show(kind, make_model, walked):
    model = first_gpt() if kind == "openai-gpt" else make_model(kind)
    expected = whole_passes(model)
    seen, masks, done = inputs(model)
    assert walked == [2]
    assert seen.keys() == expected.keys()
    for name, rows in seen.items():
        torch.testing.assert_close(rows, expected[name], rtol=1e-5, atol=1e-6)
    assert set(masks) == {None}
    assert done == pytest.approx(len(BATCHES))


def test_walking_runs_every_block_once_a_batch_and_no_head(make_model):
    model, runs = make_model("llama"), []
    model.lm_head.register_forward_pre_hook(lambda *_: runs.append("head"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: runs.append("block"))
    inputs(model)
    # Four runs check that walking gives the same: two batches, in whole passes and walked.
    assert runs.count("block") == len(BATCHES) + 4
    assert "head" not in runs


def test_a_base_model_that_takes_no_main_input_is_not_run_alone(walked):
    """What DINOv3 names as such is its encoder, which takes hidden states."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "image_size": 16, "patch_size": 8}
    model = DINOv3ViTModel(DINOv3ViTConfig(**sizes)).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    seen = {}
    modules = modules_of(model)
    for _ in stream(model, modules, [batch], lambda name, *_: seen.setdefault(name, True)):
        pass
    assert seen.keys() == set(modules)
    assert walked == [2]


def test_modules_outside_the_blocks_are_seen_too(make_model, walked):
    model = make_model("llama")
    modules = ["model.layers.1.mlp.up_proj", "lm_head"]
    seen, _, _ = inputs(model, modules=modules)
    expected = whole_passes(model, modules)
    assert walked == [2]
    for name in modules:
        torch.testing.assert_close(seen[name], expected[name], rtol=1e-5, atol=1e-6)


def test_padding_takes_whole_passes_with_the_mask(make_model, walked):
    _, masks, done = inputs(make_model("llama"), RAGGED)
    assert walked == []
    assert done == len(RAGGED)
    shown = [mask for mask in masks if mask is not None]
    assert shown[0].masks[0].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert any(mask is None for mask in masks)  # the last batch has one full row


def test_blocks_that_depend_on_more_fall_back_to_whole_passes(make_model, walked, caplog):
    caplog.set_level(logging.INFO, logger="tnlm")
    model, aside = make_model("llama"), []
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Shortcut(block, aside)
    seen, _, _ = inputs(model)
    assert walked == []
    assert "blocks depend on more than the hidden state" in caplog.text
    expected = whole_passes(model)
    assert seen.keys() == expected.keys()
    for name, rows in seen.items():
        assert torch.equal(rows, expected[name])


def test_stages_that_are_joined_by_other_code_fall_back_to_whole_passes(walked):
    """Those of PVT give a tuple in a tuple, and their sides beside it."""
    torch.manual_seed(0)
    one = [1, 1]
    config = PvtV2Config(image_size=32, num_encoder_blocks=2, depths=one, hidden_sizes=[16, 16],
                         num_attention_heads=[2, 2], sr_ratios=[2, 1], mlp_ratios=one,
                         patch_sizes=[7, 3], strides=[4, 2])  # fmt: skip
    model = PvtV2ForImageClassification(config).eval()
    modules, seen = modules_of(model), set()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32)}
    for _ in stream(model, modules, [batch], lambda name, *_: seen.add(name)):
        pass
    assert seen == set(modules)
    assert walked == []


def test_blocks_that_are_given_a_cache_fall_back_to_whole_passes(walked):
    """XLM's are, whatever its config says of caches."""
    torch.manual_seed(0)
    sizes = {"n_words": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4}
    model = XLMWithLMHeadModel(XLMConfig(**sizes, max_position_embeddings=32)).eval()
    seen, _, _ = inputs(model)
    assert walked == []
    expected = whole_passes(model)
    for name, rows in seen.items():
        torch.testing.assert_close(rows, expected[name])


def test_blocks_that_are_called_in_parts_fall_back_to_whole_passes(make_model, walked):
    model = make_model("llama")
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Parts(block)
    names = [name for name, module in model.named_modules() if name.endswith("up_proj")]
    seen, _, _ = inputs(model, modules=names)
    assert walked == []
    assert seen.keys() == set(names)


def test_each_stack_is_walked_unless_it_depends_on_another(walked):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config).eval()
    names = modules_of(model)
    seen, _, done = inputs(model, modules=names)
    assert walked == [2]  # the encoder; the decoder reads what that gives
    assert seen.keys() == set(names)
    assert any("decoder.block.1" in name for name in names)
    assert done == pytest.approx(len(BATCHES))


def states(model):
    hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    flags = [m.training for m in model.modules()]
    return hooks, flags, [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "whole"])
@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_as_it_was_after_a_failure_too(batches, error, make_model):
    def see(name, x, mask):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        if name == last:
            raise error

    model = make_model("llama").train()
    model.model.layers[0].eval()  # frozen by the user, as in fine-tuning the upper layers
    model.model.embed_tokens.requires_grad_(False)
    before, last = states(model), modules_of(model)[-1]
    inputs(model, batches)
    assert states(model) == before
    with pytest.raises(type(error)):
        list(stream(model, modules_of(model), batches, see))
    assert states(model) == before
    assert not torch.is_inference_mode_enabled()


def test_giving_up_halfway_leaves_the_model_as_it_was(make_model):
    model = make_model("llama").train()
    before = states(model)
    passes = stream(model, modules_of(model), BATCHES, lambda *_: None)
    next(passes)
    passes.close()
    assert states(model) == before
    assert not torch.is_inference_mode_enabled()


def test_a_block_may_return_a_list():
    """As those of the first GPT do."""

    class Block(torch.nn.Module):
        def forward(self, x):
            return [x + 1]

    assert torch.equal(call_block(Block(), torch.zeros(2), ((), {})), torch.ones(2))
