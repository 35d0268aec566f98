"""Models made factorized, without weights to fit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tnlm
from tests.conftest import NEED_DATA, PACKED
from tnlm.errors import BudgetError, ModelError, OptionError, TargetError
from tnlm.layers.embedding import FactorizedEmbedding, FactorizedHead
from tnlm.layers.linear import FactorizedLinear

PLAIN = sorted(set(tnlm.list_schemes()) - set(NEED_DATA) - set(PACKED))
IDS = torch.arange(40).reshape(2, 20)
SIZES = {"vocab_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
LLAMA = LlamaConfig(**SIZES, hidden_size=64, num_attention_heads=4, tie_word_embeddings=True)
BERT = BertConfig(**SIZES, hidden_size=64, num_attention_heads=4)
GPT2 = GPT2Config(
    vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=2, eos_token_id=2
)
CASES = [(LLAMA, None), (GPT2, None), (BERT, BertForMaskedLM)]


def count(model):
    return sum(p.numel() for p in model.parameters())


def factorized(model):
    """Return the factorized modules by name; heads share their factors with an embedding."""
    kinds = (FactorizedLinear, FactorizedEmbedding)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def numbers(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The result is like any compressed model


@pytest.mark.parametrize("scheme", PLAIN)
@pytest.mark.parametrize(("config", "model_class"), CASES, ids=["llama", "gpt2", "bert"])
def test_every_scheme_is_finite_counted_saved_and_made_dense(config, model_class, scheme, tmp_path):
    model = tnlm.from_config(config, scheme, model_class=model_class).eval()
    report = tnlm.report(model)
    assert count(model) == report.parameters_after < report.parameters_before
    logits = model(IDS).logits.detach()
    assert bool(logits.isfinite().all())
    tnlm.save(model, tmp_path / "model")
    loaded = tnlm.load(tmp_path / "model").eval()
    assert type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, logits)
    before, after = numbers(model), numbers(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    dense = tnlm.to_dense(model)
    assert not factorized(dense)
    torch.testing.assert_close(dense(IDS).logits, logits, rtol=1e-4, atol=1e-4)


def test_transformers_loads_it(tmp_path):
    model = tnlm.from_config(LLAMA, "shapeshifter").eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# Initial weights


@pytest.mark.parametrize("scheme", PLAIN)
def test_products_have_the_architectures_own_standard_deviation(scheme):
    config = copy.deepcopy(GPT2)
    config.n_embd, config.vocab_size, config.initializer_range = 128, 512, 0.03
    model, seen = tnlm.from_config(config, scheme, max_macs=math.inf), set()
    for name, module in factorized(model).items():
        if name.endswith("wpe"):  # a few numbers only
            continue
        depth = math.sqrt(2 * config.n_layer) if name.endswith("c_proj") else 1.0
        found = float(module.to_dense().detach().std())
        assert found == pytest.approx(0.03 / depth, rel=0.05), name
        seen.add(name.rpartition(".")[2])
    assert seen


def test_every_kind_of_matrix_has_its_own():
    config = T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4)
    model = tnlm.from_config(config, "shapeshifter", model_class=T5ForConditionalGeneration)
    dense, found = T5ForConditionalGeneration(config), set()
    for name, module in factorized(model).items():
        wanted = float(dense.get_submodule(name).weight.detach().std())
        if module.to_dense().numel() > 1000:  # not the table of relative positions
            assert float(module.to_dense().detach().std()) == pytest.approx(wanted, rel=0.1), name
            found.add(round(wanted, 1))
    assert len(found) > 1


def test_what_is_not_replaced_is_as_the_architecture_makes_it():
    dense, model = BertForMaskedLM(BERT), tnlm.from_config(BERT, "svd", model_class=BertForMaskedLM)
    wanted = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "LayerNorm" in name:
            assert bool((parameter == 1).all()), name
        elif name in wanted:
            assert float(parameter.detach().std()) == pytest.approx(0.02, rel=0.15), name
            assert parameter.dtype == wanted[name].dtype
    kept = dict(model.named_buffers())
    for name, buffer in dense.named_buffers():
        assert torch.equal(buffer, kept[name]), name
    assert not dict(model.named_parameters())["bert.embeddings.word_embeddings.weight"][0].any()


@pytest.mark.parametrize("scheme", ["albert", "shapeshifter", "tensorgpt"])
def test_the_row_of_padding_is_zero(scheme):
    model = tnlm.from_config(BERT, scheme, model_class=BertForMaskedLM)
    table = model.bert.embeddings.word_embeddings
    assert table.padding_idx == 0
    assert not table.to_dense()[0].any()
    assert bool(table.to_dense()[1:].any(1).all())


def test_rotary_frequencies_are_there():
    model, dense = tnlm.from_config(LLAMA, "svd"), LlamaForCausalLM(LLAMA)
    assert torch.equal(model.model.rotary_emb.inv_freq, dense.model.rotary_emb.inv_freq)


def test_a_seed_fixes_every_number_and_leaves_torchs_generator_alone():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = numbers(tnlm.from_config(GPT2, "shapeshifter", seed=3))
    assert torch.equal(torch.rand(3), wanted)
    again = numbers(tnlm.from_config(GPT2, "shapeshifter", seed=3))
    other = numbers(tnlm.from_config(GPT2, "shapeshifter", seed=4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "transformer.h.0.mlp.c_fc.left.weight"
    assert not torch.equal(first[name], other[name])


def test_layers_of_one_kind_differ():
    blocks = tnlm.from_config(LLAMA, "svd").model.layers
    assert not torch.equal(blocks[0].mlp.up_proj.left.weight, blocks[1].mlp.up_proj.left.weight)


@pytest.mark.parametrize("scheme", ["svd", "kron"])
def test_an_identity_block_can_be_asked_for(scheme):
    model = tnlm.from_config(LLAMA, scheme, gauge=True)
    module = model.model.layers[0].mlp.up_proj
    assert module.network.gauge is not None
    assert float(module.to_dense().detach().std()) == pytest.approx(0.02, rel=0.05)
    assert tnlm.from_config(LLAMA, scheme).model.layers[0].mlp.up_proj.network.gauge is None


def test_heads_stay_tied_to_their_embedding():
    for config, table, head in [
        (LLAMA, "model.embed_tokens", "lm_head"),
        (GPT2, "transformer.wte", "lm_head"),
    ]:
        model = tnlm.from_config(config, "albert", rank=8)
        made = model.get_submodule(head)
        assert isinstance(made, FactorizedHead)
        assert made.left is model.get_submodule(table).left
        assert isinstance(model.get_submodule(table), FactorizedEmbedding)
        plain = tnlm.from_config(config, "svd", rank=8)
        assert plain.get_submodule(head).weight is plain.get_submodule(table).weight


class Largest(TorchDispatchMode):
    """Remembers the most numbers that one tensor with data held."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize(("config", "model_class"), CASES, ids=["llama", "gpt2", "bert"])
def test_a_replaced_table_is_never_made(config, model_class):
    config = copy.deepcopy(config)
    config.vocab_size = 2**15
    assert config.vocab_size * config.hidden_size > 2**20
    with Largest() as watched:
        tnlm.from_config(config, "kngpt2", model_class=model_class)
    assert watched.numbers <= 2**20


# What is made


def test_the_config_is_not_changed_and_its_class_is_made():
    config = BertConfig(**SIZES, hidden_size=64, num_attention_heads=4)
    config.architectures = ["BertForMaskedLM"]
    before = config.to_dict()
    model = tnlm.from_config(config, "svd")
    assert type(model) is BertForMaskedLM
    assert config.to_dict() == before
    assert model.training


def test_an_auto_class_will_do():
    auto = AutoModelForSequenceClassification
    model = tnlm.from_config(BERT, "svd", model_class=auto, ignore=["classifier"])
    assert model(IDS).logits.shape == (2, 2)
    assert isinstance(model.classifier, torch.nn.Linear)


def test_dtype_is_that_of_all_weights(tmp_path):
    model = tnlm.from_config(LLAMA, "kron", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    tnlm.save(model, tmp_path / "model")
    loaded = tnlm.load(tmp_path / "model").eval()
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_targets_and_budgets_are_those_of_compress():
    model = tnlm.from_config(LLAMA, "svd", targets=["up_proj"], keep_targets=0.5)
    names = {name.rpartition(".")[2] for name in factorized(model)}
    assert names == {"up_proj"}
    plan = tnlm.report(model).plan
    assert plan.targets_after.params <= 0.5 * plan.targets_before.params
    whole = tnlm.report(tnlm.from_config(LLAMA, "svd", keep=0.6))
    assert 0.55 < whole.parameters_after / whole.parameters_before <= 0.6
    compressed = tnlm.compress(LlamaForCausalLM(copy.deepcopy(LLAMA)), "svd", keep=0.6, gauge=False)
    assert count(compressed) == whole.parameters_after


# Counts


def test_kngpt2_of_gpt2_small_has_83_9_million():
    with torch.device("meta"):
        model = tnlm.from_config(GPT2Config(), "kngpt2")
    assert all(p.is_meta for p in model.parameters())
    # One Kronecker product each: half of the numbers, and a factor of two.
    halves = 50257 * 384 + 6 * 6 * 768**2
    assert count(model) == 124_439_808 - halves + 2 * (6 * 6 + 1)
    assert count(model) == tnlm.report(model).parameters_after
    assert count(model) == pytest.approx(83.9e6, abs=0.05e6)


def test_shapeshifter_stores_its_formula_and_a_tenth_of_the_model():
    with torch.device("meta"):
        model = tnlm.from_config(GPT2Config(), "shapeshifter", keep_targets=0.1)
    plan = tnlm.report(model).plan
    stored = 0
    for layer in plan.layers:
        c, d = layer.spec["in_split"]
        a, b = layer.spec.get("out_split", (layer.shape[0], 1))  # a table's rows stay whole
        assert (a * b, c * d) == layer.shape
        stored += layer.spec["terms"] * (a * c + (b * d if layer.kind == "linear" else d))
    norms_and_biases = 12 * (4 * 768 + 9 * 768 + 4 * 768 - 4 * 768) + 2 * 768
    assert count(model) == stored + norms_and_biases
    assert count(model) < 124_439_808 / 9.9


def test_albert_stores_v_e_plus_e_h():
    config = BertConfig(vocab_size=30_000)
    with torch.device("meta"):
        model = tnlm.from_config(config, "albert", model_class=BertForMaskedLM, rank=128)
    assert count(model.bert.embeddings.word_embeddings) == 3_938_304


# Training


@pytest.mark.parametrize("options", [{}, {"gauge": True}], ids=["whole", "gauged"])
@pytest.mark.parametrize("scheme", ["svd", "shapeshifter"])
def test_a_few_steps_lower_the_loss(scheme, options):
    model = tnlm.from_config(LLAMA, scheme, keep_targets=0.4, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(64), rel=0.1)
    assert losses[-1] < 0.8 * losses[0]


# Refusals


@pytest.mark.parametrize("scheme", NEED_DATA)
def test_a_scheme_that_looks_at_data_is_refused(scheme):
    with pytest.raises(OptionError, match=f"{scheme}.* there is none yet; allowed: albert, "):
        tnlm.from_config(LLAMA, scheme)


@pytest.mark.parametrize(
    ("scheme", "arguments", "error", "message"),
    [
        ("svdd", {}, OptionError, "unknown scheme 'svdd'"),
        ("svd", {"terms": 2}, OptionError, "unknown option 'terms'"),
        ("svd", {"rank": 0}, OptionError, "rank=0; allowed"),
        ("svd", {"rank": 1000}, OptionError, "rank=1000; a 64x64 matrix allows 1 to 64"),
        ("kron", {"terms": 1000}, OptionError, "terms=1000; a 64x64 matrix"),
        ("svd", {"keep": 0.5, "keep_targets": 0.5}, BudgetError, "keep and keep_targets given"),
        ("svd", {"max_macs": 0}, BudgetError, "max_macs=0; allowed"),
        ("svd", {"targets": ["nope"]}, TargetError, "no matrix matches"),
        ("svd", {"model_class": dict}, ModelError, "allowed: a transformers model"),
    ],
)
def test_what_cannot_be_made_is_an_error(scheme, arguments, error, message):
    with pytest.raises(error, match=message):
        tnlm.from_config(LLAMA, scheme, **arguments)


def test_a_config_of_no_causal_model_is_an_error():
    with pytest.raises(
        ModelError, match=r"T5Config cannot build AutoModelForCausalLM.*model_class="
    ):
        tnlm.from_config(T5Config(), "svd")


def test_something_else_than_a_config_is_an_error():
    with pytest.raises(
        ModelError, match="expected a transformers PreTrainedConfig, got GPT2LMHeadModel"
    ):
        tnlm.from_config(GPT2LMHeadModel(GPT2), "svd")


def test_the_config_of_a_compressed_model_is_an_error():
    model = tnlm.from_config(LLAMA, "svd")
    with pytest.raises(ModelError, match="compressed or quantized"):
        tnlm.from_config(model.config, "svd")


def test_a_matrix_that_starts_as_zeros_is_an_error():
    config = copy.deepcopy(GPT2)
    config.initializer_range = 0.0
    with pytest.raises(ModelError, match=r"h\.0\.\S+ is initialised to zeros.*ignore="):
        tnlm.from_config(config, "svd")
