"""Healing by adapters: merged exactly, nothing grows, and a failure leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import tnlm
from tnlm.errors import ModelError, OptionError, RankError, TrainingError
from tnlm.recovery import heal as module
from tnlm.recovery.heal import factor_names, heal
from tnlm.recovery.training import SteadyTrainer

DATA = torch.arange(512) * 7 % 61 + 3
FAST = {"max_length": 16, "batch_size": 4, "rank": 2, "alpha": 4, "progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def loss(model):
    with torch.no_grad():
        return model(DATA[None, :64], labels=DATA[None, :64]).loss.item()


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "kron", "tt", "modegpt"])
def test_the_loss_falls_and_nothing_grows(kind, scheme, compressed, tmp_path):
    if (kind, scheme) == ("gpt2", "modegpt"):
        pytest.skip("its channels are Conv1D layers of the same kind")
    model = compressed(kind, scheme)
    before, count = loss(model), model.num_parameters()
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert heal(model, DATA, tokens=2048, learning_rate=2e-2, **FAST) is model
    assert loss(model) < before - 0.02
    assert model.num_parameters() == count
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, dense[n])}
    assert changed == {f"{name}.weight" for name in factor_names(model, 2)}
    tnlm.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(DATA[None, :16]).logits, model(DATA[None, :16]).logits)


def test_the_merge_is_what_the_adapters_did(compressed, monkeypatch):
    model, seen = compressed("llama", "svd"), []
    original = module.run

    def run(trainer, adapted, *rest, **arguments):
        original(trainer, adapted, *rest, **arguments)
        with torch.no_grad():
            seen.append(adapted.eval()(DATA[None, :16]).logits)

    monkeypatch.setattr(module, "run", run)
    heal(model, DATA, tokens=512, learning_rate=2e-2, **FAST)
    torch.testing.assert_close(model(DATA[None, :16]).logits, seen[0], rtol=1e-4, atol=1e-5)


def test_a_failure_leaves_the_model_as_it_was(compressed):
    model = compressed("llama", "svd")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(TrainingError, match="not finite"):
        heal(model, DATA, tokens=4096, learning_rate=1e30, max_grad_norm=0.0, **FAST)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training


def test_what_cannot_be_healed_says_so(compressed, make_model, monkeypatch):
    with pytest.raises(ModelError, match="no factor of this model has more than rank=2"):
        heal(make_model("llama"), DATA, **FAST)
    with pytest.raises(RankError, match="rank=0"):
        heal(compressed("llama", "svd"), DATA, **(FAST | {"rank": 0}))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"pip install 'tnlm\[train\]'"):
        heal(compressed("llama", "svd"), DATA, **FAST)


# The same as an option of compress


@pytest.mark.parametrize("recover", ["lora", "distill", "finetune"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_call_compresses_and_heals(kind, recover, make_model, tmp_path):
    plain = tnlm.compress(make_model(kind), "svd", keep_targets=0.5, progress=False)
    model = make_model(kind)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = {"calibration": DATA, "max_length": 32, "progress": False}
    tnlm.compress(model, "svd", keep_targets=0.5, recover=recover, recover_tokens=2048, **arguments)
    report = tnlm.report(model)
    assert report.seconds["recover"] > 0
    assert report.plan.request["recover"] == recover
    assert report.parameters_after == model.num_parameters() == plain.num_parameters()
    assert any(
        not torch.equal(p, plain.get_parameter(name)) for name, p in model.named_parameters()
    )
    for name, parameter in model.named_parameters():  # what tnlm did not make stays
        made = name.removesuffix(".bias") in model.config.quantization_config.modules
        if name in dense and not made:  # a layer's bias is its own
            assert torch.equal(parameter, dense[name]), name
    tnlm.save(model, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(DATA[None, :16]).logits, model(DATA[None, :16]).logits)


def test_training_data_of_its_own(make_model):
    other = torch.full((256,), 5)
    arguments = {"recover": "finetune", "recover_tokens": 1024, "max_length": 32, "progress": False}
    losses = []
    for training in (None, other):
        model = make_model("llama")
        tnlm.compress(model, "svd-llm", calibration=DATA, training=training, **arguments)
        with torch.no_grad():
            losses.append(model(other[None, :8], labels=other[None, :8]).loss)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("recover", ["lora", "distill", "finetune"])
@pytest.mark.parametrize("kind", ["tied-llama", "gpt2"])
def test_a_recovery_that_fails_leaves_the_dense_model(kind, recover, make_model, monkeypatch):
    model = make_model(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    original = SteadyTrainer.compute_loss

    def broken(self, *given, **named):
        if self.state.global_step == 2:
            raise TrainingError("as asked")
        return original(self, *given, **named)

    monkeypatch.setattr(SteadyTrainer, "compute_loss", broken)
    arguments = {"calibration": DATA, "max_length": 32, "progress": False}
    with pytest.raises(TrainingError, match="as asked"):
        tnlm.compress(model, "svd", recover=recover, recover_tokens=2048, **arguments)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not model.training
    assert not hasattr(model.config, "quantization_config")


def test_a_plan_remembers_the_recovery(make_model):
    arguments = {"calibration": DATA, "max_length": 32, "progress": False}
    plan = tnlm.plan(make_model("llama"), "svd", recover="lora", recover_tokens=512, **arguments)
    plan = tnlm.Plan.from_json(plan.to_json())
    model = tnlm.compress(make_model("llama"), plan, **arguments)
    assert "recover" in tnlm.report(model).seconds


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recover": "lorra"}, "unknown recover 'lorra'; did you mean 'lora'"),
        ({"recover_tokens": 100}, "recover_tokens= has no effect without recover="),
        ({"recover": "lora", "recover_tokens": 0}, "recover_tokens=0"),
        ({"training": DATA}, "training= has no effect without recover="),
    ],
)
def test_recoveries_that_make_no_sense_are_refused(wrong, message, make_model):
    with pytest.raises(OptionError, match=message):
        tnlm.compress(make_model("llama"), "svd-llm", calibration=DATA, max_length=32, **wrong)
