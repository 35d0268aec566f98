"""Tokens are added, cut off and changed, and no other token notices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM

import tnlm
from tnlm.checkpoint.vocabulary import set_rows
from tnlm.errors import TargetError
from tnlm.layers.embedding import FactorizedEmbedding

IDS = torch.arange(16)[None] + 3
KNGPT2 = ("gpt2", "kngpt2", {"recover": "none"})
TABLES = [
    ("tied-llama", "tensorgpt", {}),
    ("llama", "tensorgpt", {}),
    ("tied-llama", "albert", {}),
    ("llama", "albert", {}),
    ("gpt2", "albert", {}),
    ("masked-bert", "tensorgpt", {}),
    ("masked-bert", "albert", {}),
    KNGPT2,
    ("llama", "svd", {"targets": ("lm_head", "embeddings")}),
    ("llama", "tucker", {"targets": ("lm_head",)}),
    ("llama", "svd", {}),
]
SIZES = [
    ((70,), {}),
    ((70,), {"mean_resizing": False}),
    ((50,), {}),
    ((), {"pad_to_multiple_of": 48}),
    ((65,), {"pad_to_multiple_of": 5}),
    ((64,), {}),
]


def rows_of(model):
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [part.weight.detach() for part in (table, head)]


def contents(model):
    tensors = {k: (id(v), v.clone(), v.requires_grad) for k, v in model.named_parameters()}
    return tensors, {n: id(m) for n, m in model.named_modules()}, str(model.config.to_dict())


def assert_same(model, before):
    now = contents(model)
    assert now[1:] == before[1:]
    for name, (one, values, needed) in before[0].items():
        assert (now[0][name][0], now[0][name][2]) == (one, needed)
        assert torch.equal(now[0][name][1], values)


@pytest.mark.parametrize(("args", "options"), SIZES, ids=str)
@pytest.mark.parametrize(("kind", "scheme", "arguments"), TABLES)
def test_other_tokens_stay_and_new_ones_are_saved(
    kind, scheme, arguments, args, options, compressed, tmp_path
):
    model = compressed(kind, scheme, keep_targets=0.6, progress=False, **arguments)
    before, logits = rows_of(model), model(IDS).logits
    table = model.resize_token_embeddings(*args, **options)
    count = model.config.vocab_size
    assert table is model.get_input_embeddings()
    assert model(IDS).logits.shape[-1] == table.num_embeddings == count
    kept = min(count, 64)
    for old, new in zip(before, rows_of(model), strict=True):
        assert torch.equal(new[:kept], old[:kept])
        assert new.shape == (count, 32)
        assert new.isfinite().all()
    torch.testing.assert_close(model(IDS).logits[..., :kept], logits[..., :kept])
    tnlm.save(model, tmp_path / "out")
    loaded = tnlm.load(tmp_path / "out")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.resize_token_embeddings(100)
    assert loaded(IDS).logits.shape[-1] == 100
    torch.testing.assert_close(tnlm.to_dense(model)(IDS).logits, loaded(IDS).logits[..., :count])
    assert "resize_token_embeddings" not in vars(model)


@pytest.mark.parametrize("scheme", ["tensorgpt", "albert"])
def test_new_rows_are_near_those_of_a_dense_model(scheme, make_model):
    dense = make_model("tied-llama")
    model = tnlm.compress(copy.deepcopy(dense), scheme, keep_targets=0.97, progress=False)
    dense.resize_token_embeddings(66)
    model.resize_token_embeddings(66)
    for ours, theirs in zip(rows_of(model), rows_of(dense), strict=True):
        torch.testing.assert_close(ours[64:], theirs[64:], atol=0.02, rtol=0.1)


@pytest.mark.parametrize("scheme", ["tensorgpt", "albert"])
def test_a_tied_head_stays_tied_and_frozen_stays_frozen(scheme, compressed):
    model = compressed("tied-llama", scheme, keep_targets=0.6)
    model.get_input_embeddings().requires_grad_(False)
    model.resize_token_embeddings(70)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, factor in table.named_parameters():
        assert getattr(head, name) is factor
        assert not factor.requires_grad
    assert model.lm_head.training == model.training


def test_copies_and_pickles_resize_themselves(compressed):
    model = compressed("tied-llama", "albert", keep_targets=0.6)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.resize_token_embeddings(70)
        assert twin(IDS).logits.shape[-1] == 70
    assert model(IDS).logits.shape[-1] == 64


def test_half_precision_stays(compressed):
    model = compressed("tied-llama", "albert", keep_targets=0.6).to(torch.bfloat16)
    model.resize_token_embeddings(70)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("scheme", "arguments", "count", "message"),
    [
        ("kron", {"targets": ("lm_head",)}, 70, "rows share their factors"),
        ("tt", {"targets": ("lm_head", "embeddings")}, 70, "rows share their factors"),
        ("svd", {"targets": ("embeddings",)}, 4, "embed_tokens cannot have 4 rows: rank="),
    ],
)
def test_what_cannot_be_resized_is_left_as_it_was(scheme, arguments, count, message, compressed):
    model = compressed("llama", scheme, keep_targets=0.6, **arguments)
    before, logits = contents(model), model(IDS).logits
    with pytest.raises(TargetError, match=message):
        model.resize_token_embeddings(count)
    assert_same(model, before)
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_on_the_way_undoes_it_all(error, compressed, monkeypatch):
    model = compressed("llama", "albert", keep_targets=0.6)
    before = contents(model)

    def fail(*_):
        raise error

    monkeypatch.setattr(type(model), "tie_weights", fail)
    with pytest.raises(error):
        model.resize_token_embeddings(70)
    assert_same(model, before)


@pytest.mark.parametrize(("kind", "scheme", "arguments"), [*TABLES[:4], KNGPT2, TABLES[-1]])
def test_one_token_is_changed_alone(kind, scheme, arguments, compressed):
    model = compressed(kind, scheme, keep_targets=0.6, **arguments)
    before, ids = rows_of(model)[0].clone(), torch.tensor([5, 9])
    table = model.get_input_embeddings()
    set_rows(model, ids, before[[7, 8]])  # rows that the factors can hold
    now, others = rows_of(model)[0], [i for i in range(64) if i not in (5, 9)]
    assert torch.equal(now[others], before[others])
    torch.testing.assert_close(now[ids], before[[7, 8]], atol=1e-5, rtol=1e-4)
    assert model.get_input_embeddings() is table
    assert isinstance(table, FactorizedEmbedding if scheme != "svd" else nn.Embedding)
    for ids, rows in [([64], 1), ([-1], 1), ([1, 1], 2), ([1], 2)]:
        with pytest.raises(TargetError, match="allowed: ids from 0 to 63"):
            set_rows(model, torch.tensor(ids), torch.zeros(rows, 32))


def test_an_untied_bert_can_be_saved_after_it_was_resized(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=64, num_attention_heads=2, tie_word_embeddings=False, **sizes)
    model = tnlm.compress(BertForMaskedLM(config), "tensorgpt", keep_targets=0.9, progress=False)
    model.eval().resize_token_embeddings(70)
    tnlm.save(model, tmp_path / "out")
    ids = torch.tensor([[3, 69]])
    assert torch.equal(tnlm.load(tmp_path / "out").eval()(ids).logits, model(ids).logits)
