from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tnlm
from tnlm.errors import ModelError, TargetError
from tnlm.targets.checks import check_model, check_weights
from tnlm.targets.matching import ALL_LINEAR, EMBEDDINGS
from tnlm.targets.selection import select

BLOCK = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
BLOCK += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LINEARS = [f"model.layers.{layer}.{name}" for layer in range(2) for name in BLOCK]
TABLE = "model.embed_tokens"


class ScaledEmbedding(nn.Embedding):
    """As in Gemma: the rows are multiplied by something."""

    def forward(self, ids):
        return 3.0 * super().forward(ids)


def chosen(model, *args):
    return [target.name for target in select(model, *args).targets]


def replace_table(model, kind):
    """Give a model another class of embedding with the same weight."""
    old = model.get_input_embeddings()
    table = kind(old.num_embeddings, old.embedding_dim, padding_idx=old.padding_idx)
    table.weight = old.weight
    model.set_input_embeddings(table)
    return model


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (ALL_LINEAR, LINEARS),
        (EMBEDDINGS, [TABLE]),
        (nn.Embedding, [TABLE]),
        (nn.Linear, [*LINEARS, "lm_head"]),
        (r".*\.1\.mlp\.(up|down)_proj", LINEARS[-2:]),
        ("lm_head", ["lm_head"]),
        (["q_proj", "mlp.up_proj"], [n for n in LINEARS if n.endswith(("q_proj", "up_proj"))]),
        ([LINEARS[3], LINEARS[0]], [LINEARS[0], LINEARS[3]]),
        ([EMBEDDINGS, "o_proj"], [TABLE, LINEARS[3], LINEARS[10]]),
        ((nn.Embedding, "lm_head"), [TABLE, "lm_head"]),
    ],
)
def test_words_choose_in_the_order_of_the_model(words, expected, tiny_llama):
    assert chosen(tiny_llama(), words) == expected


@pytest.mark.parametrize("words", ["proj", "q_proj", ["proj"], ["_proj"], ["self_attn"]])
def test_parts_of_a_name_do_not_match(words, tiny_llama):
    with pytest.raises(TargetError, match="no matrix matches"):
        select(tiny_llama(), words)


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        (None, LINEARS),
        (r".*\.mlp\..*", [n for n in LINEARS if ".mlp." not in n]),
        (["k_proj", "v_proj"], [n for n in LINEARS if n[-6:] not in ("k_proj", "v_proj")]),
        (LINEARS[:-1], LINEARS[-1:]),
        (nn.Embedding, LINEARS),
    ],
)
def test_ignore_takes_the_same_words(ignore, left, tiny_llama):
    assert chosen(tiny_llama(), ALL_LINEAR, ignore) == left


def test_weights_and_biases_are_views_of_the_model(tiny_llama, tiny_bert, tiny_gpt2):
    for model in (tiny_llama(), tiny_bert(), tiny_gpt2()):
        for target in select(model).targets:
            module = model.get_submodule(target.module)
            assert target.weight(model).shape == target.shape
            assert target.params == target.weight(model).numel()
            whole = module.weight.untyped_storage().data_ptr()
            assert target.weight(model).untyped_storage().data_ptr() == whole
            if module.bias is None:
                assert target.bias(model) is None
            else:
                assert target.bias(model).shape == target.shape[:1]


def test_grouped_queries_keep_their_own_shapes(tiny_llama):
    shapes = {t.name.rpartition(".")[2]: t.shape for t in select(tiny_llama()).targets}
    assert shapes["q_proj"] == (32, 32)
    assert shapes["k_proj"] == shapes["v_proj"] == (16, 32)
    assert shapes["down_proj"] == (32, 48)


def test_fused_attention_of_gpt2_is_three_matrices(tiny_gpt2):
    model = tiny_gpt2()
    fused = "transformer.h.0.attn.c_attn"
    parts = [t for t in select(model).targets if t.module == fused]
    assert [t.name for t in parts] == [f"{fused}.q", f"{fused}.k", f"{fused}.v"]
    x = torch.randn(5, 32)
    applied = [x @ t.weight(model).T + t.bias(model) for t in parts]
    expected = model.get_submodule(fused)(x)
    torch.testing.assert_close(torch.cat(applied, dim=-1), expected)


def test_gpt2_stores_in_by_out_and_targets_say_out_by_in(tiny_gpt2):
    model = tiny_gpt2()
    [target] = select(model, ["h.0.mlp.c_fc"]).targets
    assert model.get_submodule(target.name).weight.shape == (32, 48)
    assert target.shape == (48, 32)
    assert chosen(model, Conv1D) == chosen(model, ALL_LINEAR)


def test_cross_attention_of_gpt2_fuses_two():
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16, add_cross_attention=True)
    names = chosen(GPT2LMHeadModel(config), ["crossattention.c_attn"])
    assert [name.rpartition(".")[2] for name in names] == ["k", "v"]


@pytest.mark.parametrize("words", [EMBEDDINGS, ["lm_head"], "lm_head", [EMBEDDINGS, "lm_head"]])
def test_a_tied_head_is_one_target_with_its_embedding(words, tiny_llama):
    [target] = select(tiny_llama(tie_word_embeddings=True), words).targets
    assert (target.name, target.kind, target.tied) == (TABLE, "embedding", ("lm_head",))


def test_an_untied_head_is_a_target_of_its_own(tiny_llama):
    table, head = select(tiny_llama(), [EMBEDDINGS, "lm_head"]).targets
    assert (table.kind, table.tied) == ("embedding", ())
    assert head.kind == "linear"


@pytest.mark.parametrize("tied", [False, True])
def test_subclasses_that_compute_something_else_are_skipped(tied, tiny_llama):
    model = replace_table(tiny_llama(tie_word_embeddings=tied), ScaledEmbedding)
    found = select(model, [EMBEDDINGS, "q_proj"])
    assert [t.name for t in found.targets] == [LINEARS[0], LINEARS[7]]
    assert "ScaledEmbedding" in found.skipped[TABLE]


def test_linears_that_share_a_weight_are_skipped(tiny_llama):
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    found = select(model)
    assert len(found.targets) == len(LINEARS) - 2
    assert found.skipped == {
        LINEARS[5]: f"its weight is shared with {LINEARS[12]}",
        LINEARS[12]: f"its weight is shared with {LINEARS[5]}",
    }


def test_embeddings_that_share_a_weight_are_skipped(tiny_llama):
    model = tiny_llama()
    model.second = copy.deepcopy(model.model.embed_tokens)
    model.second.weight = model.model.embed_tokens.weight
    with pytest.raises(TargetError, match="several embeddings share the weight"):
        select(model, EMBEDDINGS)


def test_embeddings_with_a_largest_norm_are_skipped(tiny_llama):
    model = tiny_llama()
    model.model.embed_tokens.max_norm = 1.0
    with pytest.raises(TargetError, match=f"{TABLE}: an embedding with max_norm"):
        select(model, EMBEDDINGS)


def test_offloaded_weights_are_skipped(tiny_llama):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj._hf_hook = object()
    found = select(model)
    assert LINEARS[5] not in [t.name for t in found.targets]
    assert "compress before dispatching" in found.skipped[LINEARS[5]]


def test_nothing_found_names_what_could_have_been_asked(tiny_llama):
    with pytest.raises(TargetError, match=r"'\.\*qproj'.* did you mean 'q_proj'\? Allowed: .*k_"):
        select(tiny_llama(), ".*qproj")
    with pytest.raises(TargetError, match=r"'q_proj'.*; use \['q_proj'\], a list of endings"):
        select(tiny_llama(), "q_proj")
    with pytest.raises(TargetError, match=r"ignore='all-linear'.* Allowed: down_proj, "):
        select(tiny_llama(), ALL_LINEAR, ALL_LINEAR)
    with pytest.raises(TargetError, match=r"targets=\[\]"):
        select(tiny_llama(), [])


@pytest.mark.parametrize("arguments", [("*.q_proj",), (ALL_LINEAR, "(mlp")])
def test_a_broken_regular_expression_is_named(arguments, tiny_llama):
    with pytest.raises(TargetError, match=r"not a regular expression"):
        select(tiny_llama(), *arguments)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(bad, tiny_llama):
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = bad
    with pytest.raises(ModelError, match=f"{LINEARS[12]} holds 1 NaN or infinite"):
        check_weights(model, select(model).targets)
    check_weights(model, select(model, ignore=r".*\.up_proj").targets)


def test_weights_without_data_are_named(tiny_llama):
    model = tiny_llama().to("meta")
    with pytest.raises(ModelError, match=f"{LINEARS[0]} has no data"):
        check_weights(model, select(model).targets)


def test_only_transformers_models_are_taken():
    with pytest.raises(ModelError, match="not Linear"):
        check_model(nn.Linear(2, 2))
    with pytest.raises(ModelError, match="PreTrainedModel is wanted"):
        tnlm.compress(nn.Sequential(nn.Linear(8, 8)), "svd")


def test_ignoring_what_the_model_does_not_have_is_a_slip(tiny_llama):
    with pytest.raises(TargetError, match=r"ignore='q_pro' .* did you mean 'q_proj'"):
        select(tiny_llama(), ignore="q_pro")
