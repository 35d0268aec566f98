from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from tnlm.errors import ModelError, TrainingError
from tnlm.layers.adapters import matrix
from tnlm.recovery.pruning.groups import find_groups
from tnlm.recovery.pruning.slicing import cut_groups, smaller


def parts(model, kind, kept):
    names = [n for n, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    names = [f"{model.base_model_prefix}.{name}" for name in names]
    groups = find_groups(model, names, kind)
    weights = {n: functools.partial(matrix, model.get_submodule(n)) for n in names}
    return dict.fromkeys(groups, torch.tensor(kept)), weights


def test_rows_columns_and_biases_of_the_kept_groups_stay(tiny_gpt2):
    model, dense, values = tiny_gpt2(), tiny_gpt2(), {"n_inner": 3}
    for each in (model, dense):
        each.transformer.h[1].mlp.c_fc.bias.data.copy_(torch.arange(48.0))
    kept, weights = parts(model, "channels", [40, 2, 7])
    template = smaller(model, list(kept), {"channels": 3}, values)
    cut_groups(model, template, kept, values, weights)
    made, old = model.transformer.h[1].mlp, dense.transformer.h[1].mlp
    assert type(made.c_fc) is Conv1D
    assert torch.equal(made.c_fc.weight, old.c_fc.weight[:, [40, 2, 7]])
    assert made.c_fc.bias.tolist() == [40, 2, 7]
    assert torch.equal(made.c_proj.weight, old.c_proj.weight[[40, 2, 7]])
    assert torch.equal(made.c_proj.bias, old.c_proj.bias)
    attention, before = model.transformer.h[1].attn, dense.transformer.h[1].attn
    assert torch.equal(attention.c_attn.weight, before.c_attn.weight)
    assert (model.config.n_inner, made.c_fc.nf, made.c_proj.nx) == (3, 3, 3)


def test_slabs_of_the_kept_heads_stay(tiny_llama):
    model, dense = tiny_llama(attention_bias=True), tiny_llama(attention_bias=True)
    values = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    kept, weights = parts(model, "heads", [1])
    template = smaller(model, list(kept), {"heads": 1}, values)
    cut_groups(model, template, kept, values, weights)
    made, old = model.model.layers[0].self_attn, dense.model.layers[0].self_attn
    assert torch.equal(made.q_proj.weight, old.q_proj.weight[16:])
    assert torch.equal(made.k_proj.weight, old.k_proj.weight[8:])
    assert torch.equal(made.v_proj.bias, old.v_proj.bias[8:])
    assert torch.equal(made.o_proj.weight, old.o_proj.weight[:, 16:])
    assert made.o_proj.bias.shape == (32,)


def test_config_that_cannot_say_what_slicing_leaves(tiny_llama):
    model = tiny_llama()
    kept, _ = parts(model, "channels", [0])
    with pytest.raises(ModelError, match=r"builds .*gate_proj.weight as \[2, 32\] .* \[1, 32\]"):
        smaller(model, list(kept), {"channels": 1}, {"intermediate_size": 2})


def test_the_smaller_model_draws_no_random_numbers():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = DiffLlamaForCausalLM(DiffLlamaConfig(**sizes, num_attention_heads=2))
    kept, _ = parts(model, "channels", [0])
    before = torch.get_rng_state()
    smaller(model, list(kept), {"channels": 1}, {"intermediate_size": 1})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_weight_that_overflows_changes_nothing(tiny_llama):
    model = tiny_llama().half()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept, weights = parts(model, "channels", [0, 1])
    last = list(weights)[-1]
    weights[last] = lambda: torch.full((32, 48), 1e6)
    values = {"intermediate_size": 2}
    template = smaller(model, list(kept), {"channels": 2}, values)
    with pytest.raises(TrainingError, match=rf"{last} is not finite"):
        cut_groups(model, template, kept, values, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.intermediate_size == 48
