from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import tnlm
from tnlm.errors import (
    BudgetError,
    CalibrationError,
    ModelError,
    OptionError,
    RankError,
    TrainingError,
)
from tnlm.layers.adapters import matrix
from tnlm.layers.swap import Swap
from tnlm.recovery.pruning import prune as module
from tnlm.recovery.pruning.masks import Masks
from tnlm.recovery.pruning.prune import prune

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
SHARED = SIZES | {"num_key_value_heads": 2}
PHI = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
QUICK = {"steps": 6, "rank": 4, "every": 2, "learning_rate": 1e-2, "progress": False}
OTHERS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHARED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHARED, head_dim=8)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHARED)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SHARED, **PHI)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHARED, **PHI)),  # gates and values are one matrix
}
CHANNELS_ONLY = ["gpt2", "masked-bert", "phi3"]
WITH_HEADS = ["llama", "tied-llama", *(kind for kind in OTHERS if kind not in CHANNELS_ONLY)]
every_kind = pytest.mark.parametrize("kind", WITH_HEADS + CHANNELS_ONLY)


@pytest.fixture
def make(make_model):
    """Make a model of some kind, whose biases are not zero."""

    def made(kind):
        torch.manual_seed(1)
        model = (OTHERS[kind]() if kind in OTHERS else make_model(kind)).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
        return model

    return made


@pytest.fixture(scope="module")
def batches():
    ids = (torch.arange(128).reshape(4, 32) * 7) % 61 + 3
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part}
        for part in ids.split(2)
    ]


def options(kind):
    return QUICK | ({"keep": 0.75, "heads": False} if kind in CHANNELS_ONLY else {})


def loss_of(model, batches):
    with torch.no_grad():
        return sum(float(model(**batch).loss) for batch in batches)


def contents(model):
    return (
        {n: t.detach().view(torch.uint8).numpy().tobytes() for n, t in model.state_dict().items()},
        [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()],
        [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
        [(n, len(m._forward_pre_hooks), len(m._forward_hooks)) for n, m in model.named_modules()],
        model.config.to_dict(),
    )


def watch(monkeypatch, batches):
    """Note the masked model's logits, and how many numbers its masks say will go."""
    seen = {}
    real_train, real_cut = module._train, module.cut_groups

    def train(model, *args):
        real_train(model, *args)
        with torch.no_grad():
            seen["masked"] = model.eval()(**batches[0]).logits

    def cut(model, template, kept, *args):
        lost = sum(g.params(model) * (g.count - len(index)) for g, index in kept.items())
        seen["expected"] = model.num_parameters() - lost
        real_cut(model, template, kept, *args)

    monkeypatch.setattr(module, "_train", train)
    monkeypatch.setattr(module, "cut_groups", cut)
    return seen


# What comes out


@every_kind
def test_sliced_model_does_what_the_masked_model_did(kind, make, batches, monkeypatch):
    seen = watch(monkeypatch, batches)
    model = make(kind)
    dense = model(**batches[0]).logits.detach()
    assert prune(model, batches, **options(kind)) is model
    logits = model(**batches[0]).logits
    assert not torch.allclose(logits, dense, atol=1e-3)  # something was learned and lost
    torch.testing.assert_close(logits, seen["masked"], atol=1e-5, rtol=1e-5)
    assert model.num_parameters() == seen["expected"]


@every_kind
def test_pruned_model_is_ordinary(kind, make, batches, tmp_path):
    model = prune(make(kind), batches, **options(kind))
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert type(again) is type(model)
    for (name, module_), (_, other) in zip(
        model.named_modules(), again.named_modules(), strict=True
    ):
        assert type(module_) is type(other), name
        numbers = {k: v for k, v in vars(module_).items() if type(v) is int}
        assert numbers.items() <= vars(other).items(), name
    torch.testing.assert_close(again(**batches[0]).logits, model(**batches[0]).logits)


@every_kind
def test_share_of_the_blocks_is_met(kind, make, batches):
    def count(model):
        return sum(
            p.numel() for n in module._linear(model) for p in model.get_submodule(n).parameters()
        )

    model = make(kind)
    before, given = count(model), options(kind)
    share = count(prune(model, batches, **given)) / before
    keep = given.get("keep", 0.5)
    assert keep - 0.02 < share <= keep


@pytest.mark.parametrize("kv", [2, 4])
def test_heads_and_sizes_under_grouped_queries(kv, tiny_llama, batches):
    model = prune(tiny_llama(num_key_value_heads=kv), batches, keep=0.5, **QUICK)
    config = model.config
    assert (config.num_key_value_heads, config.num_attention_heads) == (kv // 2, 2)
    assert config.head_dim == 8
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (16, 32)
    assert attention.v_proj.weight.shape == (8 * kv // 2, 32)
    assert attention.num_key_value_groups == 4 // kv


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_pruned_model_generates_with_its_cache(kind, make, batches):
    model = prune(make(kind), batches, **options(kind))
    prompt = batches[0]["input_ids"][:1, :8]
    wanted = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), **wanted)
    whole = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), use_cache=False, **wanted
    )
    assert torch.equal(cached, whole)


def test_only_heads_or_only_channels(make, batches):
    heads = prune(make("llama"), batches, keep=0.9, channels=False, **QUICK)
    assert (heads.config.num_key_value_heads, heads.config.intermediate_size) == (1, 48)
    channels = prune(make("llama"), batches, keep=0.9, heads=False, **QUICK)
    assert channels.config.num_key_value_heads == 2
    assert channels.config.intermediate_size == 40  # 15360 numbers, 192 a channel


def test_pruned_model_is_compressed_further(make, batches, tmp_path):
    model = prune(make("tied-llama"), batches, **QUICK)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    smaller = tnlm.compress(model, "svd", keep=0.9)
    tnlm.save(smaller, tmp_path / "svd")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "svd")
    torch.testing.assert_close(again(**batches[0]).logits, smaller(**batches[0]).logits)


def test_dtype_flags_and_attention_stay(tiny_llama, batches):
    model = tiny_llama(attn_implementation="eager").to(torch.bfloat16).train()
    model.model.embed_tokens.weight.requires_grad_(False)
    prune(model, batches, **QUICK)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.embed_tokens.weight"]
    assert all(m.training for m in model.modules())
    assert model.config._attn_implementation == "eager"
    assert not hasattr(model, "peft_config")


# What it learns


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_lowers_the_loss(kind, make, batches, monkeypatch):
    """Compared with the dense model from which the same groups are cut without training."""
    untrained = make(kind)
    real = module.cut_groups

    def cut(model, template, kept, values, weights):
        own = {n: functools.partial(matrix, untrained.get_submodule(n)) for n in weights}
        real(untrained, copy.deepcopy(template), kept, values, own)
        real(model, template, kept, values, weights)

    monkeypatch.setattr(module, "cut_groups", cut)
    trained = prune(make(kind), batches, **options(kind) | {"steps": 100})
    assert trained.num_parameters() == untrained.num_parameters()
    assert loss_of(trained, batches) < 0.95 * loss_of(untrained, batches)


def test_same_seed_same_model_and_torch_is_left_alone(make, batches):
    first = prune(make("gpt2"), batches, **options("gpt2"), seed=3)
    second = prune(make("gpt2"), batches, **options("gpt2"), seed=3)
    third = prune(make("gpt2"), batches, **options("gpt2"), seed=4)
    one, two, other = (m.transformer.h[0].mlp.c_fc.weight for m in (first, second, third))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    again = make("gpt2")
    state = torch.random.get_rng_state()
    prune(again, batches, **options("gpt2"))
    assert torch.equal(state, torch.random.get_rng_state())


def test_channels_without_effect_go_first(tiny_llama, batches):
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data[1::3] = 0.0
        layer.mlp.down_proj.weight.data[:, 1::3] = 0.0
    dense = model(**batches[0]).logits.detach()
    # A third of the channels has no effect; with a rate of nothing the rest stays as it was.
    gone = 2 * 16 * 3 * 32 / 15360
    prune(model, batches, keep=1 - gone, heads=False, **QUICK | {"learning_rate": 1e-12})
    assert model.config.intermediate_size == 32
    torch.testing.assert_close(model(**batches[0]).logits, dense, atol=1e-5, rtol=1e-5)


def test_more_and_more_is_masked(tiny_llama, batches, monkeypatch):
    found = []
    real = Masks.shrink
    monkeypatch.setattr(Masks, "shrink", lambda s, counts: found.append(counts) or real(s, counts))
    timing = {"steps": 20, "every": 3, "warmup": 0.2, "cooldown": 0.15}
    model = prune(tiny_llama(), batches, **QUICK | timing)
    last = model.config.intermediate_size
    steps = [3, 6, 9, 12, 15, 17, 18, 19, 20]
    wanted = [last + (48 - last) * min(1, max(0, (17 - t) / 13)) ** 3 for t in steps]
    assert [counts["channels"] for counts in found] == pytest.approx(wanted)
    assert [counts["heads"] for counts in found][-4:] == [1, 1, 1, 1]


def test_squared_is_another_measure(tiny_llama, batches, monkeypatch):
    found = []
    real = module.importances
    monkeypatch.setattr(
        module, "importances", lambda *a, **k: found.append(k["kind"]) or real(*a, **k)
    )
    prune(tiny_llama(), batches, kind="squared", **QUICK)
    assert set(found) == {"squared"}


# What is refused, and leaves the model as it was


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"keep": 0.0}, BudgetError, "allowed: a fraction"),
        ({"keep": 1.0}, BudgetError, "allowed: a fraction"),
        ({"keep": 0.2, "heads": False}, BudgetError, "parameters too many"),
        ({"keep": 0.5, "channels": False}, BudgetError, "parameters too many"),
        ({"heads": False, "channels": False}, OptionError, "nothing to prune"),
        ({"kind": "tailor"}, OptionError, "did you mean 'taylor'"),
        ({"rank": 33}, RankError, "rank=33 at .*; allowed: 1 to 32"),
        ({"rank": 0}, RankError, "rank=0 at .*; allowed: 1 to"),
        ({"alpha": 0}, OptionError, "alpha"),
        ({"decay": 1.0}, OptionError, "decay"),
        ({"every": 0}, OptionError, "every"),
        ({"steps": 0}, OptionError, "steps"),
        ({"warmup": 0.7, "cooldown": 0.7}, OptionError, "fractions"),
        ({"learning_rate": 0.0}, OptionError, "learning_rate"),
    ],
)
def test_options_out_of_range(change, error, message, tiny_llama, batches):
    model = tiny_llama()
    before = contents(model)
    with pytest.raises(error, match=message):
        prune(model, batches, **QUICK | change)
    assert contents(model) == before


@pytest.mark.parametrize("kind", CHANNELS_ONLY)
def test_heads_need_a_config_that_holds_them(kind, make, batches):
    with pytest.raises(OptionError, match=r"head_dim is independent .* use heads=False"):
        prune(make(kind), batches, **QUICK)


def test_opt_keeps_its_heads(batches):
    config = {"ffn_dim": 48, "word_embed_proj_dim": 32} | SIZES
    config.pop("intermediate_size")
    model = OPTForCausalLM(OPTConfig(**config)).eval()
    with pytest.raises(OptionError, match="heads=False"):
        prune(model, batches, **QUICK)
    prune(model, batches, keep=0.8, heads=False, **QUICK)
    assert model.config.ffn_dim == model.model.decoder.layers[0].fc1.out_features < 48


@pytest.mark.parametrize("sizes", [{"num_key_value_heads": 1}, {"num_attention_heads": 1}])
def test_one_group_of_heads_cannot_be_fewer(sizes, tiny_llama, batches):
    model = tiny_llama(**{"num_key_value_heads": 1} | sizes)
    with pytest.raises(OptionError, match="accepts no fewer"):
        prune(model, batches, **QUICK)
    prune(model, batches, heads=False, keep=0.6, **QUICK)


def test_heads_that_would_not_divide_the_hidden_size_are_not_chosen(tiny_llama, batches):
    # Llama's config refuses 3 heads at a hidden size of 32.
    model = prune(tiny_llama(num_key_value_heads=4), batches, keep=0.75, **QUICK)
    assert model.config.num_attention_heads == 4
    assert model.config.intermediate_size < 36


def test_a_loss_that_is_not_finite(tiny_llama, batches):
    model = tiny_llama()
    model.lm_head.weight.data[5, 0] = torch.nan
    before = contents(model)
    with pytest.raises(TrainingError, match="loss at step 1 is nan; nothing was changed"):
        prune(model, batches, **QUICK)
    assert contents(model) == before


@pytest.mark.parametrize("place", ["_train", "cut_groups", "late"])
def test_failure_leaves_the_model_bit_identical(place, make, batches, monkeypatch):
    model = make("qwen2")
    before = contents(model)

    def fail(*args):
        if place == "_train":
            train(*args)
        raise KeyboardInterrupt

    train = module._train
    if place == "late":
        real, calls = Swap.replace, []

        def replace(swap, *args):
            calls.append(1)
            return fail() if len(calls) == 9 else real(swap, *args)

        monkeypatch.setattr(Swap, "replace", replace)
    else:
        monkeypatch.setattr(module, place, fail)
    with pytest.raises(KeyboardInterrupt):
        prune(model, batches, **QUICK)
    assert contents(model) == before


def test_batches_that_say_nothing(tiny_llama, batches):
    for wrong in ([], [{k: v for k, v in batches[0].items() if k != "labels"}]):
        with pytest.raises(CalibrationError, match="allowed: at least one"):
            prune(tiny_llama(), wrong, **QUICK)


def test_models_that_are_no_use(tiny_llama, tiny_bert, batches, compressed):
    with pytest.raises(ModelError, match="computes no loss"):
        prune(tiny_bert(), batches, **QUICK)
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    with pytest.raises(ModelError, match="not a single stack of blocks"):
        prune(T5ForConditionalGeneration(T5Config(**sizes, num_heads=2)), batches, **QUICK)
    with pytest.raises(ModelError, match="compressed already"):
        prune(compressed("llama", "svd", keep=0.9), batches, **QUICK)
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="up_proj holds 1 NaN"):
        prune(model, batches, **QUICK)


def test_without_peft(tiny_llama, batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"pip install 'tnlm\[train\]'"):
        prune(tiny_llama(), batches, **QUICK)
