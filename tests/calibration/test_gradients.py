from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    VJEPA2Config,
    VJEPA2ForVideoClassification,
)
from transformers.pytorch_utils import Conv1D

from tnlm.calibration import backward, gradients, store
from tnlm.calibration.data import count_tokens, token_batches
from tnlm.calibration.gradients import collect_gradients
from tnlm.calibration.statistics import collect
from tnlm.compression.choices import Calibration
from tnlm.compression.job import prepare
from tnlm.compression.request import make_request
from tnlm.errors import CalibrationError, OptionError
from tnlm.targets.selection import select

IDS = torch.arange(96) * 7 % 61 + 3
BATCHES = token_batches(IDS, max_length=16)
RAGGED = token_batches([[3, 14, 25, 6], [17, 8, 39], [10, 51]], batch_size=3)
UP = "model.layers.1.mlp.up_proj"
VALUE = "model.layers.0.self_attn.v_proj"


class Experts(nn.Module):
    """Sends every token to one of four experts, each called with its tokens only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(4)])

    def forward(self, x):
        rows = x.reshape(-1, 32)
        weights, chosen = self.gate(rows).softmax(-1).max(-1)
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            at = (chosen == index).nonzero().flatten()
            if len(at):
                out = out.index_add(0, at, expert(rows[at]) * weights[at, None])
        return self.inner(x) + out.reshape(x.shape)


@pytest.fixture(scope="session")
def make(make_model):
    def t5():
        torch.manual_seed(0)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        return T5ForConditionalGeneration(
            T5Config(vocab_size=64, decoder_start_token_id=0, **sizes)
        ).eval()

    def mixtral():
        torch.manual_seed(0)
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        return MixtralForCausalLM(MixtralConfig(vocab_size=64, **sizes, **heads)).eval()

    def experts():
        model = make_model("llama")
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.mlp = Experts(layer.mlp)
        return model

    makers = {"t5": t5, "mixtral": mixtral, "experts": experts}
    return lambda kind: makers[kind]() if kind in makers else make_model(kind)


def modules_of(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


def gather(model, batches=BATCHES, modules=None, **arguments):
    arguments = {"progress": False, "labels": "data"} | arguments
    return collect_gradients(model, modules or modules_of(model), batches, **arguments)


def draw(logits, generator):
    """A label for every position, by the first word that the uniform number does not reach."""
    sums = logits.detach().double().softmax(-1).cumsum(-1)
    uniform = torch.rand(len(logits), generator=generator, dtype=torch.float64)
    return (sums <= uniform[:, None] * sums[:, -1:]).sum(-1)


def loss_of(model, ids, seed=None):
    """The summed loss of one sequence without padding, with labels sampled if there is a seed."""
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits = model(input_ids=ids, **extra, use_cache=False).logits[0]
    if "MaskedLM" in type(model).__name__:
        wanted = ids[0]
    else:
        logits, wanted = logits[:-1], ids[0, 1:]
    wanted = wanted if seed is None else draw(logits, seed)
    return F.cross_entropy(logits, wanted, reduction="sum")


def direct(model, batches, modules, seed=None):
    """G and Fisher information by autograd on the whole model, one sequence after another."""
    seed = None if seed is None else torch.Generator().manual_seed(seed)
    moments, squares, outputs = {}, {}, {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output})
        )
        for name in modules
    ]
    rows = [
        ids[mask.bool()][None]
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for ids in rows:
        outputs.clear()
        loss = loss_of(model, ids, seed)
        names = list(outputs)  # an expert may have been passed over
        weights = [model.get_submodule(name).weight for name in names]
        slopes = torch.autograd.grad(loss, [*weights, *outputs.values()])
        for name, slope, g in zip(names, slopes, slopes[len(names) :], strict=False):
            slope = slope.T if isinstance(model.get_submodule(name), Conv1D) else slope
            squares[name] = squares.get(name, 0) + slope.double() ** 2 / len(rows)
            g = g.flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + g.T @ g / count_tokens(batches)
    for handle in handles:
        handle.remove()
    return moments, squares


def assert_close(found, expected, tolerance=1e-4):
    """Sums are of float32 products, so errors are relative to the largest entries."""
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * scale)


KINDS = ["llama", "tied-llama", "gpt2", "masked-bert", "t5", "mixtral"]


@pytest.fixture
def walked(monkeypatch):
    """Count the walks."""
    counts = []
    real = backward._walk
    monkeypatch.setattr(backward, "_walk", lambda *a: counts.append(len(a[1])) or real(*a))
    return counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_statistics_equal_autograd_on_the_whole_model(kind, batches, make, walked):
    model = make(kind)
    modules = modules_of(model)
    moments, squares = direct(model, batches, modules)
    found = gather(model, batches, fisher=True)
    assert walked == ([2] if batches is BATCHES else [])  # of T5 the encoder
    assert found.tokens == count_tokens(batches)
    for name in modules:
        rows, columns = squares[name].shape
        assert found.tensor(name, "gradient").dtype == torch.float64
        assert found.tensor(name, "gradient").shape == (rows, rows)
        assert found.tensor(name, "fisher").shape == (rows, columns)
        assert_close(found.tensor(name, "gradient"), moments[name])
        assert_close(found.tensor(name, "fisher"), squares[name])


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_sampled_labels_equal_autograd_with_the_same_samples(batches, make):
    model = make("llama")
    moments, squares = direct(model, batches, [UP, VALUE], seed=5)
    found = gather(model, batches, [UP, VALUE], fisher=True, labels="sampled", seed=5)
    for name in (UP, VALUE):
        assert_close(found.tensor(name, "gradient"), moments[name])
        assert_close(found.tensor(name, "fisher"), squares[name])


def test_labels_are_sampled_unless_told_otherwise(make):
    model, options = make("llama"), {"progress": False}
    default = collect_gradients(model, [UP], BATCHES, **options).tensor(UP, "gradient")
    for same, arguments in [
        (True, {"labels": "sampled", "seed": 0}),
        (False, {"labels": "sampled", "seed": 1}),
        (False, {"labels": "data"}),
    ]:
        other = gather(model, modules=[UP], **arguments).tensor(UP, "gradient")
        assert torch.equal(default, other) == same
    with pytest.raises(CalibrationError, match=r"'fisher' of .* was not gathered, only gradient"):
        collect_gradients(model, [UP], BATCHES, **options).tensor(UP, "fisher")


@pytest.mark.parametrize("labels", ["sampled", "data"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_batches_of_any_size_give_the_same(kind, labels, make):
    model = make(kind)
    ragged = [[3, 14, 25, 6], [17, 8, 39], [10, 51], [4, 5, 6, 7, 8]]
    for data in (IDS, ragged):
        one, many = (
            gather(
                model,
                token_batches(data, max_length=16, batch_size=size),
                fisher=True,
                labels=labels,
            )
            for size in (1, 4)
        )
        for name in modules_of(model):
            for which in ("gradient", "fisher"):
                assert_close(many.tensor(name, which), one.tensor(name, which).double())


def test_modules_called_with_some_tokens_and_never(make):
    model = make("experts")
    modules = ["model.layers.0.mlp.gate"]
    modules += [f"model.layers.0.mlp.experts.{index}" for index in range(4)]
    batches = token_batches(IDS, max_length=16, batch_size=3)
    moments, squares = direct(model, token_batches(IDS, max_length=16), modules)
    found = gather(model, batches, modules, fisher=True)
    for name in modules:
        assert_close(found.tensor(name, "gradient"), moments[name])
        assert_close(found.tensor(name, "fisher"), squares[name])
    model.model.layers[0].mlp.gate.weight.data.zero_()  # ties go to the first expert
    for call in (gather, lambda *a: collect(*a[:1], a[2], a[1], progress=False)):
        assert set(call(model, batches, modules).leaders) == set(modules[:2])


def test_a_module_that_blocks_share_has_one_weight_gradient(make, walked):
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    name = "model.layers.0.mlp.up_proj"
    weight = model.get_submodule(name).weight
    losses = (loss_of(model, batch["input_ids"]) for batch in BATCHES)
    slopes = [torch.autograd.grad(loss, weight)[0].double() for loss in losses]
    found = gather(model, modules=[name], fisher=True)
    assert walked == []
    assert_close(found.tensor(name, "fisher"), sum(slope**2 for slope in slopes) / len(slopes))


def test_a_head_outside_the_blocks(make, walked):
    model, modules = make("llama"), [UP, "lm_head"]
    moments, squares = direct(model, BATCHES, modules)
    found = gather(model, modules=modules, fisher=True)
    assert walked == [2]
    for name in modules:
        assert_close(found.tensor(name, "gradient"), moments[name])
        assert_close(found.tensor(name, "fisher"), squares[name])


def test_long_sequences_are_summed_in_parts(make, monkeypatch):
    expected = gather(make("llama"))
    monkeypatch.setattr(gradients, "ROWS", 5)
    found = gather(make("llama"))
    for name in expected.leaders:
        assert_close(found.tensor(name, "gradient"), expected.tensor(name, "gradient"))


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_bfloat16_models_have_finite_statistics(batches, make):
    expected = gather(make("llama"), batches, fisher=True)
    found = gather(make("llama").to(torch.bfloat16), batches, fisher=True)
    for name in expected.leaders:
        assert found.tensor(name, "gradient").dtype == torch.float64
        assert found.tensor(name, "fisher").dtype == torch.float32
        for which in ("gradient", "fisher"):
            assert_close(found.tensor(name, which), expected.tensor(name, which).double(), 0.2)


def test_a_caller_in_inference_mode_gets_the_same(make):
    expected = gather(make("llama"))
    model = make("llama")
    with torch.inference_mode():
        found = gather(model, token_batches(IDS.clone(), max_length=16))
    assert torch.equal(found.tensor(UP, "gradient"), expected.tensor(UP, "gradient"))


# The model


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
@pytest.mark.parametrize("error", [None, RuntimeError("broken"), KeyboardInterrupt()])
def test_the_model_is_left_as_it_was(batches, error, make, monkeypatch):
    model = make("llama").train()
    model.model.layers[0].eval()
    model.model.embed_tokens.requires_grad_(False)
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if index % 2 else None

    def state():
        flags = [module.training for module in model.modules()]
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
        needs = [parameter.requires_grad for parameter in model.parameters()]
        slopes = [None if p.grad is None else float(p.grad.sum()) for p in model.parameters()]
        return flags, hooks, needs, slopes, torch.is_grad_enabled()

    def fail(*_):
        raise error

    before = state()
    if error is None:
        gather(model, batches)
    else:
        for where in ("_add", "flush"):
            with monkeypatch.context() as patch:
                patch.setattr(gradients._Gradients, where, fail)
                with pytest.raises(type(error)):
                    gather(model, batches)
            assert state() == before
    assert state() == before


# Cache


def test_a_cache_hit_needs_no_pass_and_each_kind_has_its_own(make, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("a pass ran")

    model, arguments = make("llama"), {"modules": [UP], "cache_dir": tmp_path}
    first = gather(model, fisher=True, **arguments)
    collect(model, [UP], BATCHES, cache_dir=tmp_path, progress=False)
    monkeypatch.setattr(gradients, "stream", fail)
    again = gather(make("llama"), fisher=True, **arguments)
    for which in ("gradient", "fisher"):
        assert torch.equal(again.tensor(UP, which), first.tensor(UP, which))
    for change in (
        {"fisher": False},
        {"fisher": True, "labels": "sampled", "seed": 1},
        {"fisher": True, "labels": "sampled"},
        {"fisher": True, "batches": token_batches(IDS, max_length=32)},
    ):
        with pytest.raises(AssertionError, match="a pass ran"):
            gather(model, **(arguments | change))
    assert collect(model, [UP], BATCHES, cache_dir=tmp_path).moment(UP).shape == (32, 32)


# Bad data


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_gradients_of_exactly_zero_are_kept_and_warned_of(batches, make, caplog):
    model = make("llama")
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()
    found = gather(model, batches, fisher=True)
    assert "gradients at 3 of 14 modules are exactly zero" in caplog.text
    assert not found.tensor(VALUE, "gradient").any()
    assert not found.tensor(VALUE, "fisher").any()
    assert found.tensor(UP, "gradient").any()
    caplog.clear()
    gather(make("llama"), batches)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_named(bad, batches, make):
    model = make("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = bad
    with pytest.raises(CalibrationError, match=r"gradients at model\.layers\.\d\..* not finite"):
        gather(model, batches)


def test_weight_gradients_that_overflow_are_named(make):
    model = make("llama")
    model.model.layers[1].mlp.down_proj.weight.data *= 1e-30
    model.model.layers[1].mlp.up_proj.weight.data *= 1e30
    name = "model.layers.1.mlp.down_proj"
    gather(model, modules=[name])
    with pytest.raises(CalibrationError, match=rf"gradients at {name} are not finite"):
        gather(model, modules=[name], fisher=True)


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_a_model_without_a_head_is_named(batches, make):
    model = make("bert")
    with pytest.raises(CalibrationError, match=f"{type(model).__name__} has none; load it with it"):
        gather(model, batches)


CLASSES = [{"input_ids": [3 + i, 20, 9 + 2 * i][: 2 + i % 2], "labels": i % 3} for i in range(6)]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_classifier_is_asked_for_the_class_of_every_sequence(kind, batch_size, make):
    config = make(kind).config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    classes = {"bert": BertForSequenceClassification, "gpt2": GPT2ForSequenceClassification}
    model = classes[kind](config).eval()
    name = "bert.encoder.layer.1.output.dense" if kind == "bert" else "transformer.h.1.mlp.c_proj"
    batches = token_batches(CLASSES, batch_size=batch_size)
    found = gather(model, batches, [name], fisher=True).tensor(name, "fisher")
    squares = 0.0
    for row in CLASSES:
        model.zero_grad()
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits
        F.cross_entropy(logits, torch.tensor([row["labels"]])).backward()
        gradient = model.get_submodule(name).weight.grad
        squares += (gradient if kind == "bert" else gradient.T).square() / len(CLASSES)
    assert_close(found, squares.double())


def test_a_classifier_without_labels_or_with_others_says_so(make):
    model = BertForSequenceClassification(make("bert").config).eval()
    name = "bert.encoder.layer.1.output.dense"
    assert gather(model, RAGGED, [name], labels="sampled").tensor(name, "gradient").any()
    with pytest.raises(CalibrationError, match="needs the class of every sequence"):
        gather(model, RAGGED, [name])
    with pytest.raises(CalibrationError, match="a label is 2; the model has 2 classes"):
        gather(model, token_batches(CLASSES), [name])


def test_blocks_of_a_body_that_its_head_does_not_call_are_left_out():
    """V-JEPA 2 has a predictor, which its classifier of clips passes over."""
    torch.manual_seed(0)
    sizes = {"crop_size": 16, "patch_size": 8, "frames_per_clip": 2, "num_labels": 3}
    sizes |= {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "mlp_ratio": 1}
    sizes |= {f"pred_{name}": sizes[name] for name in list(sizes) if name.startswith(("h", "n"))}
    model = VJEPA2ForVideoClassification(VJEPA2Config(**sizes, num_pooler_layers=1)).eval()
    batch = {"pixel_values_videos": torch.randn(2, 2, 3, 16, 16)}
    modules = list(dict.fromkeys(target.module for target in select(model).targets))
    found = gather(model, [batch], modules, labels="sampled")
    reached = {name for name in modules if name in found.leaders}
    assert reached == {name for name in modules if ".predictor." not in name}


def test_modules_never_reached_are_left_out_and_those_without_vectors_named(make):
    model, name = make("masked-bert"), "bert.encoder.layer.0.output.dense"
    model.spare = nn.Linear(4, 4)
    assert set(gather(model, modules=[name, "spare"]).leaders) == {name}
    with pytest.raises(CalibrationError, match="reached none of the modules, such as spare"):
        gather(model, modules=["spare"])
    with pytest.raises(CalibrationError, match=r"word_embeddings has no vectors as inputs"):
        gather(model, modules=["bert.embeddings.word_embeddings"])


def test_padding_that_cannot_be_matched_is_an_error(make):
    names = [f"model.layers.0.mlp.experts.{index}" for index in range(4)]
    with pytest.raises(CalibrationError, match=r"padding cannot be matched .*experts\.\d"):
        gather(make("experts"), RAGGED, names)


def test_unknown_labels(make):
    with pytest.raises(OptionError, match="labels='date'; did you mean 'data'"):
        gather(make("llama"), labels="date")


def test_a_progress_bar_counts_the_batches(make, capsys):
    for batches in (BATCHES, RAGGED):
        gather(make("llama"), batches, [UP, "lm_head"], progress=True)
        assert "computing gradients: 100%" in capsys.readouterr().err


def test_tensors_move_to_files_when_memory_is_short(make, monkeypatch):
    expected = gather(make("llama"), fisher=True)
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    found = gather(make("llama"), fisher=True)
    assert not found._memory
    for which in ("gradient", "fisher"):
        assert torch.equal(found.tensor(UP, which), expected.tensor(UP, which))


# What is gathered


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_diagonal_alone_is_that_of_the_whole(kind, make):
    model = make(kind)
    whole, part = gather(model), gather(model, moment="diagonal")
    for name in modules_of(model):
        found = part.tensor(name, "gradient")
        assert found.dtype == torch.float64
        assert_close(found, whole.tensor(name, "gradient").diagonal())


def test_the_fisher_information_needs_no_moment(make):
    model = make("llama")
    both, alone = gather(model, fisher=True), gather(model, fisher=True, moment="none")
    assert torch.equal(both.tensor(UP, "fisher"), alone.tensor(UP, "fisher"))
    with pytest.raises(CalibrationError, match=r"'gradient' of .* was not gathered, only fisher"):
        alone.tensor(UP, "gradient")


def test_what_is_gathered_has_caches_of_its_own(make, tmp_path):
    model = make("llama")
    for moment in ("full", "diagonal", "none"):
        gather(model, fisher=True, moment=moment, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("wrong", [{"moment": "some"}, {"moment": "none"}])
def test_nothing_to_gather_is_refused(wrong, make):
    with pytest.raises(OptionError, match="moment="):
        gather(make("llama"), **wrong)


@pytest.mark.parametrize(
    ("metric", "allocation", "dimensions"),
    [("fisher-inputs", "uniform", None), ("fisher-elements", "loss", None),
     ("input", "loss", 1), ("identity", "loss", 1), ("two-sided", "uniform", 2)],
)  # fmt: skip
def test_a_job_gathers_what_it_reads(metric, allocation, dimensions, make):
    request = make_request("svd-llm", metric=metric, allocation=allocation)
    data = Calibration(IDS, num_samples=8, max_length=16)
    job = prepare(make("gpt2"), request, ["c_attn"], None, data, False)
    if dimensions is None:
        with pytest.raises(CalibrationError, match=r"gradient of .* was not gathered"):
            job.evidence.statistic(job.units[0], "gradient")
    else:
        assert job.evidence.statistic(job.units[0], "gradient").dim() == dimensions
    for target in job.units:
        assert 0 < job.evidence.importance(target) < float("inf")
