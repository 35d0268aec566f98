from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from tnlm.errors import BudgetError, ModelError, OptionError
from tnlm.recovery.pruning import sizes
from tnlm.recovery.pruning.groups import CHANNELS, HEADS, find_groups
from tnlm.recovery.pruning.sizes import changes, resized, settle


def parts(model):
    names = [n for n, m in model.model.named_modules(prefix="model") if isinstance(m, nn.Linear)]
    return names, {kind: find_groups(model, names, kind) for kind in (HEADS, CHANNELS)}


def share(model, names, groups, kept):
    total = sum(p.numel() for n in names for p in model.get_submodule(n).parameters())
    lost = sum(g.params(model) * (g.count - n) for k, n in kept.items() for g in groups[k])
    return (total - lost) / total


@given(keep=st.floats(0.3, 0.99), kv=st.sampled_from([2, 4]), bias=st.booleans())
def test_share_is_met_from_below_and_nearly(tiny_llama, keep, kv, bias):
    model = tiny_llama(num_key_value_heads=kv, attention_bias=bias, mlp_bias=bias)
    names, groups = parts(model)
    kept = settle(model, groups, names, keep)
    assert share(model, names, groups, kept) <= keep
    if kept[CHANNELS] < 48:
        assert share(model, names, groups, kept | {CHANNELS: kept[CHANNELS] + 1}) > keep
    only = {CHANNELS: groups[CHANNELS]}
    if keep > 0.5:
        kept = settle(model, only, names, keep)
        assert share(model, names, only, kept) <= keep
        assert share(model, names, only, {CHANNELS: kept[CHANNELS] + 1}) > keep


def test_numbers_of_heads_that_the_config_refuses(tiny_llama):
    model = tiny_llama(num_key_value_heads=4)
    names, groups = parts(model)
    assert settle(model, {HEADS: groups[HEADS]}, names, 0.9) == {HEADS: 2}  # 3 do not divide 32
    assert settle(model, groups, names, 0.75)[HEADS] == 4  # 3 would be, and 4 is as near as 2
    with pytest.raises(BudgetError, match="parameters too many"):
        settle(model, {HEADS: groups[HEADS]}, names, 0.5)


def test_one_group_of_heads(tiny_llama):
    model = tiny_llama(num_key_value_heads=1)
    names, groups = parts(model)
    with pytest.raises(OptionError, match="LlamaConfig accepts no fewer"):
        settle(model, groups, names, 0.5)


def test_config_gets_all_sizes(tiny_llama):
    model = tiny_llama()
    _, groups = parts(model)
    firsts = {kind: blocks[0] for kind, blocks in groups.items()}
    found = changes(model, firsts, {HEADS: 1, CHANNELS: 7})
    assert found == {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "intermediate_size": 7,
    }
    made = resized(model.config, found)
    assert made.to_dict() == LlamaConfig(**model.config.to_dict() | found).to_dict()
    assert model.config.intermediate_size == 48


def test_config_that_does_not_name_its_channels(tiny_llama, monkeypatch):
    model = tiny_llama()
    _, groups = parts(model)
    monkeypatch.setattr(sizes, "WIDTHS", ("width",))
    with pytest.raises(ModelError, match="LlamaConfig has none of width"):
        changes(model, {CHANNELS: groups[CHANNELS][0]}, {CHANNELS: 7})
