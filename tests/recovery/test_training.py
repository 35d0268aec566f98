import copy
import json
import logging
import random

import pytest
import torch
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    TrainerCallback,
)

import tnlm.recovery
from tnlm.errors import CheckpointError, ModelError, OptionError, TrainingError
from tnlm.layers.linear import FactorizedLinear
from tnlm.recovery.model_kinds import examples_for
from tnlm.recovery.training import finetune

KINDS = ["llama", "gpt2", "classifier"]
SCHEMES = ["svd", "kron"]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


class Stop(TrainerCallback):
    """Ends the training at a step, as an interruption would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Break(TrainerCallback):
    """Spoils a parameter at a step, and keeps all of the step before."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, model, **_):
        if state.global_step == self.step - 1:
            self.before = {name: value.clone() for name, value in model.state_dict().items()}
        if state.global_step == self.step:
            with torch.no_grad():
                next(model.parameters()).fill_(float("nan"))


def test_exposed():
    assert tnlm.recovery.finetune is finetune
    with pytest.raises(AttributeError, match="nothing"):
        _ = tnlm.recovery.nothing


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", [*KINDS, "masked-bert"])
def test_training_lowers_the_loss(kind, scheme, model_of, data_of, loss_of):
    model, given = model_of(kind, scheme), data_of(kind)
    before = loss_of(model, given)
    assert finetune(model, **given, epochs=3, learning_rate=1e-2, progress=False) is model
    assert loss_of(model, given) < 0.9 * before


def test_a_single_step_trains(model_of, data_of):
    model = model_of("gpt2", SCHEMES[0])
    before = state(model)
    finetune(model, **data_of("gpt2"), tokens=1, learning_rate=1e-2, progress=False)
    assert any(not torch.equal(before[name], held) for name, held in state(model).items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_alone_are_trained(scheme, model_of, data_of):
    model = model_of("gpt2", scheme)
    before = state(model)
    finetune(model, **data_of("gpt2"), train="factors", learning_rate=1e-2, progress=False)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FactorizedLinear)}
    inside = {f"{n}.{child}.weight" for n, m in layers.items() for child, _ in m.named_children()}
    assert changed == inside


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_else_is_left_as_it_was(checkpointing, model_of, data_of):
    model = model_of("gpt2", "kron")
    model.transformer.wte.weight.requires_grad_(False)
    python, torch_state = random.getstate(), torch.get_rng_state()
    finetune(
        model, **data_of("gpt2"), progress=False, activation_checkpointing=checkpointing, bf16=True
    )
    assert not model.training
    assert not model.is_activation_checkpointing
    assert model.config.use_cache
    assert "forward" not in vars(model)
    assert all(p.grad is None for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == [
        "transformer.wte.weight"
    ]
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("scheme", [*SCHEMES, "basis-sharing"])
def test_an_interrupted_training_goes_on_to_the_same_result(scheme, model_of, data_of, tmp_path):
    start, given = model_of("gpt2", scheme), data_of("gpt2")  # with dropout
    given |= {"batch_size": 2, "learning_rate": 1e-2, "progress": False, "epochs": 2}
    whole = finetune(copy.deepcopy(start), **given)
    with pytest.raises(KeyboardInterrupt):
        finetune(copy.deepcopy(start), **given, output_dir=tmp_path, callbacks=[Stop(9)])
    assert (tmp_path / "checkpoint-8").is_dir()
    resumed = finetune(copy.deepcopy(start), **given, output_dir=tmp_path)
    assert same(state(whole), state(resumed))
    assert not same(state(start), state(resumed))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-16")
    assert same(state(whole), state(loaded))


def test_a_checkpoint_that_was_cut_off_is_passed_over(model_of, data_of, tmp_path):
    given = data_of("llama") | {"batch_size": 2, "progress": False, "output_dir": tmp_path}
    start = model_of("llama", "svd")
    whole = finetune(copy.deepcopy(start), **given)
    (tmp_path / "checkpoint-99").mkdir()
    assert same(state(whole), state(finetune(copy.deepcopy(start), **given)))


def test_checkpoints_of_another_training_are_refused(model_of, data_of, tmp_path):
    given = data_of("llama") | {"progress": False, "output_dir": tmp_path}
    model = finetune(model_of("llama", "svd"), **given)
    before = state(model)
    with pytest.raises(CheckpointError, match="differs in learning_rate, seed;"):
        finetune(model, **given, seed=3, learning_rate=1e-3)
    with pytest.raises(CheckpointError, match="resume=True"):
        finetune(model, **given, resume=False)
    with pytest.raises(CheckpointError, match="differs in data"):
        finetune(model, **(given | {"data": torch.arange(64)}))
    assert same(before, state(model))
    assert json.loads((tmp_path / "tnlm_training.json").read_text())["seed"] == 0


def test_a_loss_that_is_lost_stops_and_restores(model_of, data_of, loss_of):
    model, given = model_of("llama", "svd"), data_of("llama") | {"batch_size": 2}
    flags = [p.requires_grad for p in model.parameters()]
    message = r"LlamaForCausalLM: the loss is nan at step 3 of 8; the parameters of step 2"
    with pytest.raises(TrainingError, match=message):
        finetune(model, **given, progress=False, callbacks=[spoil := Break(3)])
    assert same(state(model), spoil.before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training


def test_a_last_update_that_is_not_finite_is_found(model_of, data_of):
    model, given = model_of("llama", "svd"), data_of("llama") | {"batch_size": 8}
    with pytest.raises(TrainingError, match="after the last update at step 2 of 2"):
        finetune(model, **given, progress=False, callbacks=[Break(2)])
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_model_without_a_finite_loss_is_not_changed(model_of, data_of):
    model = model_of("llama", "svd")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(TrainingError, match=r"is nan at step 0 of .*no step was taken"):
        finetune(model, **data_of("llama"), progress=False)
    pairs = zip(before, model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in pairs)


def test_logs_and_prints_nothing(model_of, data_of, caplog, capsys, tmp_path):
    for progress in (False, True):
        with caplog.at_level(logging.INFO, logger="tnlm"):
            finetune(model_of("llama", "svd"), **data_of("llama"), progress=progress)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert ("2/2" in shown.err) == progress
    assert "step 1 of 2: loss" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"learning_rat": 1}, OptionError, "did you mean 'learning_rate'"),
        ({"optim": "none"}, OptionError, "rejects"),
        ({"train": "factor"}, OptionError, "did you mean 'factors'"),
        ({"train": "factors"}, OptionError, "leaves no parameter"),
        ({"max_length": 129}, OptionError, "128 positions"),
        ({"tokens": 0}, OptionError, "tokens=0"),
        ({"epochs": 0}, OptionError, "epochs=0"),
        ({"batch_size": 0}, OptionError, "batch_size=0"),
        ({"learning_rate": float("nan")}, OptionError, "learning_rate=nan"),
        ({"warmup": 1.5}, OptionError, "warmup=1.5"),
        ({"data": torch.tensor([[1, 64]])}, TrainingError, "example 0 has the token id 64"),
        ({"data": []}, TrainingError, "no tokens"),
    ],
)
def test_refused_before_work(arguments, error, message, model_of, data_of):
    model = model_of("llama")
    before = state(model)
    with pytest.raises(error, match=message):
        finetune(model, **(data_of("llama") | arguments), progress=False)
    assert same(before, state(model))


def test_classes_must_fit_the_model(model_of):
    with pytest.raises(TrainingError, match="example 1 has the class 3, but the model has 3"):
        examples_for(
            model_of("classifier"), [{"input_ids": [4], "label": i} for i in (0, 3)], max_length=9
        )
    with pytest.raises(TrainingError, match="no row of the data has a column 'label'"):
        examples_for(model_of("classifier"), [[4, 5]], max_length=9)


def test_a_causal_classifier_must_know_its_padding(tiny_gpt2, data_of, loss_of):
    model = GPT2ForSequenceClassification(tiny_gpt2(num_labels=3).config)
    with pytest.raises(OptionError, match=r"set model.config.pad_token_id"):
        finetune(model, **data_of("classifier"), progress=False)
    model.config.pad_token_id = 0
    before = loss_of(model, data_of("classifier"))
    finetune(model, **data_of("classifier"), learning_rate=1e-2, progress=False)
    assert loss_of(model, data_of("classifier")) < before


def test_a_model_without_a_head_is_refused(make_model):
    with pytest.raises(ModelError, match="BertModel cannot be trained"):
        finetune(make_model("bert"), [[4, 5]])
