from __future__ import annotations

import pytest
import torch
from torch import nn

from tnlm.errors import ModelError, OptionError
from tnlm.recovery.pruning.groups import find_groups
from tnlm.targets.selection import select


def linear(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_a_group_is_one_key_head_with_its_query_heads(kv, tiny_llama):
    model = tiny_llama(num_key_value_heads=kv)
    for index, groups in enumerate(find_groups(model, linear(model), "heads")):
        assert groups.parent == f"model.layers.{index}.self_attn"
        assert groups.count == kv
        sizes = {c.module.rpartition(".")[2]: (c.axis, c.slabs.size) for c in groups.cuts}
        shared = 32 // kv
        assert sizes == {
            "q_proj": (0, shared),
            "k_proj": (0, 8),
            "v_proj": (0, 8),
            "o_proj": (1, shared),
        }
        assert groups.params(model) == (2 * shared + 2 * 8) * 32


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_groups_of_heads_are_independent(kv, tiny_llama):
    """What one group's rows hold moves its own columns' inputs, and no others."""
    model = tiny_llama(num_key_value_heads=kv)
    groups = find_groups(model, linear(model), "heads")[0]
    seen = []
    reader = model.get_submodule(groups.consumer.module)
    hook = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    ids = torch.arange(3, 35).reshape(1, 32)
    model(ids)
    with torch.no_grad():
        for cut in groups.producers:
            model.get_submodule(cut.module).weight[: cut.slabs.size].mul_(-1.5).add_(0.1)
    model(ids)
    hook.remove()
    moved = (seen[0] - seen[1]).abs().amax((0, 1)) > 0
    assert bool(moved[: groups.consumer.slabs.size].all())
    assert not bool(moved[groups.consumer.slabs.size :].any())


@pytest.mark.parametrize(
    ("kind", "parent", "numbers"),
    [
        ("llama", "model.layers.1.mlp", 3 * 32),
        ("gpt2", "transformer.h.1.mlp", 2 * 32 + 1),
        ("bert", "encoder.layer.1", 2 * 32 + 1),
        ("masked-bert", "bert.encoder.layer.1", 2 * 32 + 1),
    ],
)
def test_channels(kind, parent, numbers, make_model):
    model = make_model(kind)
    groups = find_groups(model, linear(model), "channels")
    assert [g.count for g in groups] == [48, 48]
    assert groups[1].parent == parent
    assert groups[1].params(model) == numbers


def test_blocks_that_differ(tiny_llama):
    model = tiny_llama()
    for name in ("gate_proj", "up_proj"):
        setattr(model.model.layers[1].mlp, name, nn.Linear(32, 40, bias=False))
    model.model.layers[1].mlp.down_proj = nn.Linear(40, 32, bias=False)
    with pytest.raises(ModelError, match=r"layers\.1: every block .* channels=False"):
        find_groups(model, linear(model), "channels")


def test_a_matrix_of_another_shape(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].self_attn.v_proj = nn.Linear(32, 8, bias=False)
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn: .* heads of width 8"):
        find_groups(model, linear(model), "heads")
    model.model.layers[0].mlp.up_proj = nn.Linear(32, 8, bias=False)
    with pytest.raises(ModelError, match=r"layers\.0: every block must have one set of channels"):
        find_groups(model, linear(model), "channels")


def test_what_depends_on_the_number_of_groups(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(32)  # OLMo 2 has a norm over all heads
    model.model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.LayerNorm(48))
    with pytest.raises(ModelError, match=r"q_norm\.weight may depend on the number of heads"):
        find_groups(model, linear(model), "heads")
    with pytest.raises(ModelError, match=r"layers\.0\.mlp: channels cannot be cut: .* mixes"):
        find_groups(model, linear(model), "channels")
    model.model.layers[0].self_attn.q_norm = nn.LayerNorm(8)  # Qwen 3: of one head
    assert len(find_groups(model, linear(model), "heads")) == 2
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(8))  # GPT-OSS: one a head
    with pytest.raises(ModelError, match="sinks may depend"):
        find_groups(model, linear(model), "heads")


def test_matrices_left_out(tiny_llama):
    model = tiny_llama()
    names = [name for name in linear(model) if not name.endswith("o_proj")]
    with pytest.raises(OptionError, match="no heads that can be cut"):
        find_groups(model, names, "heads")
    names = [name for name in linear(model) if not name.endswith("layers.0.self_attn.o_proj")]
    with pytest.raises(ModelError, match=r"layers\.0: every block must have one set of heads"):
        find_groups(model, names, "heads")
