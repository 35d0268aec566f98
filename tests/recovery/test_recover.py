"""Training as an option of compress: all or nothing, and only what tnlm made."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, BertForSequenceClassification

import tnlm
from tnlm.errors import OptionError, TrainingError
from tnlm.layers.made import made_layers
from tnlm.recovery import heal as healing
from tnlm.recovery.distillation import Distiller
from tnlm.recovery.guard import GuardedTrainer

DATA = torch.arange(512) * 7 % 61 + 3
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.mark.parametrize("recover", ["lora", "distill", "finetune"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_call_compresses_and_heals(kind, recover, make_model, tmp_path):
    plain = tnlm.compress(make_model(kind), "svd", keep_targets=0.5, progress=False)
    model = make_model(kind)
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = {"calibration": DATA, "max_length": 32, "progress": False}
    tnlm.compress(model, "svd", keep_targets=0.5, recover=recover, recover_tokens=1024, **arguments)
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


@pytest.mark.parametrize("recover", ["lora", "finetune"])
def test_the_seed_draws_what_training_draws(recover, make_model):
    def trained(seed):
        arguments = {"calibration": DATA, "max_length": 32, "progress": False, "seed": seed}
        model = make_model("llama")
        tnlm.compress(model, "svd", recover=recover, recover_tokens=1024, **arguments)
        return model.get_parameter("model.layers.0.mlp.up_proj.left.weight").detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("recover", ["lora", "finetune"])
def test_narrowed_feed_forwards_are_trained(recover, make_model):
    arguments = {"calibration": DATA, "max_length": 32, "progress": False}
    model, plain = make_model("llama"), make_model("llama")
    tnlm.compress(plain, "modegpt", keep_targets=0.5, **arguments)
    tnlm.compress(
        model, "modegpt", keep_targets=0.5, recover=recover, recover_tokens=1024, **arguments
    )
    narrowed = [made for made in made_layers(plain) if made.entry["kind"] == "sliced"]
    assert narrowed
    for made in narrowed:
        assert not torch.equal(made.module.weight, model.get_submodule(made.name).weight), made.name


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
    original = GuardedTrainer.training_step

    def broken(self, *given, **named):
        if self.state.global_step == 2:
            raise TrainingError("as asked")
        return original(self, *given, **named)

    def trained_and_broken(*given):
        train(*given)
        raise TrainingError("as asked")

    train = healing.train
    monkeypatch.setattr(healing, "train", trained_and_broken)
    monkeypatch.setattr(GuardedTrainer, "training_step", broken)
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


def test_a_classifier_is_compressed_by_its_classes_and_healed(make_model, word_tokenizer):
    config = make_model("bert").config
    config.num_labels = 3
    rows = [{"text": f"word{i} word9 word{2 * i}", "label": i % 3} for i in range(24)]
    data = tnlm.labelled(rows, word_tokenizer)
    arguments = {"calibration": data, "keep_targets": 0.5, "progress": False}
    for scheme in ("fwsvd", "lora-svd"):
        for recover in ("lora", "finetune"):
            torch.manual_seed(0)
            model = BertForSequenceClassification(config).eval()
            tnlm.compress(model, scheme, recover=recover, recover_tokens=64, **arguments)
            assert tnlm.report(model).seconds["recover"] > 0


@pytest.mark.parametrize(
    ("scheme", "compared"),
    [("svd", {"logits"}), ("kngpt2", {"embedding", "attention", "hidden", "labels"})],
)
def test_a_scheme_is_distilled_by_its_own_loss(scheme, compared, make_model, monkeypatch):
    asked, terms = [], Distiller.terms

    def watched(self, *given):
        output, found = terms(self, *given)
        asked.append(set(found))
        return output, found

    monkeypatch.setattr(Distiller, "terms", watched)
    model, arguments = make_model("gpt2"), {"calibration": DATA, "max_length": 32}
    options = {"recover": "distill", "recover_tokens": 256, "progress": False}
    tnlm.compress(model, scheme, **options, **arguments)
    assert asked
    assert all(found == compared for found in asked)
    assert model.config._attn_implementation == "sdpa"
