from __future__ import annotations

import copy

import pytest
import torch

from tnlm.checkpoint.disk_weights import DiskWeights, read_when_called
from tnlm.checkpoint.skeleton import open_skeleton
from tnlm.utils.residency import offloaded, resident, scratch_of

IDS = torch.arange(12).reshape(1, 12) + 3
BLOCKS = ["model.layers.0", "model.layers.1"]


@pytest.fixture
def made(tiny_llama, tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    skeleton, places = open_skeleton(tmp_path)
    read_when_called(skeleton, DiskWeights(skeleton, places, tmp_path), BLOCKS)
    return model, skeleton


def on_disk(model):
    return all(bool(parameter.isnan().all()) for parameter in model.parameters())


def test_a_call_reads_every_block_and_frees_it(made):
    model, skeleton = made
    held = []
    skeleton.model.layers[1].register_forward_pre_hook(lambda *_: held.append(on_disk(skeleton)))
    with torch.no_grad():
        assert torch.equal(skeleton(IDS).logits, model(IDS).logits)
    assert held == [False]
    assert on_disk(skeleton)


def test_a_call_that_fails_frees_the_block(made):
    _, skeleton = made

    def stop(*_):
        raise RuntimeError("stop")

    handle = skeleton.model.layers[0].mlp.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"), torch.no_grad():
        skeleton(IDS)
    assert on_disk(skeleton)
    handle.remove()
    assert skeleton(IDS).logits.isfinite().all()


def test_uses_are_counted_and_copies_stay(made):
    model, skeleton = made
    block, dense = skeleton.model.layers[0], model.model.layers[0].mlp.up_proj.weight
    with resident(skeleton, BLOCKS[0]), resident(skeleton, f"{BLOCKS[0]}.mlp"):
        clone = copy.deepcopy(block)
        with resident(skeleton, BLOCKS[0], recurse=False):
            assert torch.equal(block.mlp.up_proj.weight, dense)
    assert on_disk(skeleton)
    assert torch.equal(clone.mlp.up_proj.weight, dense)
    with torch.no_grad():
        clone(torch.ones(1, 2, 32), position_embeddings=(torch.ones(1, 2, 8),) * 2)
    assert torch.equal(clone.mlp.up_proj.weight, dense)


def test_a_module_that_is_replaced_meanwhile_is_freed(made):
    _, skeleton = made
    old = skeleton.model.layers[0].mlp.up_proj
    with resident(skeleton, BLOCKS[0]):
        skeleton.model.layers[0].mlp.up_proj = torch.nn.Linear(32, 48, bias=False)
    assert old.weight.isnan().all()
    assert skeleton.model.layers[0].mlp.up_proj.weight.isfinite().all()


def test_a_model_in_memory_is_left_alone(tiny_llama, tmp_path, made):
    model = tiny_llama()
    with resident(model, "model"):
        assert model(IDS).logits.isfinite().all()
    assert offloaded(model) is scratch_of(model) is None
    assert scratch_of(made[1]) == tmp_path


def test_other_files_have_another_identity(tiny_llama, tmp_path):
    found = []
    for seed in (0, 1):
        tiny_llama(seed=seed).save_pretrained(tmp_path)
        found.append(DiskWeights(*open_skeleton(tmp_path), None).identity)
    assert found[0] != found[1]
