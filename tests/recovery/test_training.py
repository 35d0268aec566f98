"""Fine-tuning: it learns, resumes to the same result, and stops at a loss that is not finite."""

from __future__ import annotations

import pytest
import torch
from transformers import BertForSequenceClassification, TrainerCallback

import tnlm
from tnlm.errors import CalibrationError, ModelError, OptionError, TrainingError
from tnlm.recovery import training
from tnlm.recovery.examples import collate, examples
from tnlm.recovery.training import finetune

DATA = torch.arange(512) * 7 % 61 + 3
FAST = {"max_length": 16, "batch_size": 4, "learning_rate": 1e-2, "progress": False}
# accelerate pins memory only where there is a device for it, and says so of a CPU.
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


def loss(model):
    with torch.no_grad():
        return model(DATA[None, :64], labels=DATA[None, :64]).loss.item()


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def classifier(make_model):
    config = make_model("bert").config
    config.num_labels = 3
    torch.manual_seed(0)
    return BertForSequenceClassification(config).eval()


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2"])
@pytest.mark.parametrize("scheme", ["svd", "kron", "tt"])
def test_a_compressed_model_learns(kind, scheme, compressed):
    model = compressed(kind, scheme)
    before, state = loss(model), torch.get_rng_state()
    assert finetune(model, DATA, tokens=1024, **FAST) is model
    assert loss(model) < before - 0.3
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_only_factors_are_trained_on_request(compressed):
    model = compressed("llama", "svd")
    before = weights(model)
    finetune(model, DATA, tokens=128, train="factors", **FAST)
    for name, parameter in model.named_parameters():
        made = ".left." in name or ".right." in name
        assert torch.equal(parameter, before[name]) != made, name
        assert parameter.requires_grad


def test_a_classifier_learns_its_classes(classifier):
    tnlm.compress(classifier, "svd", progress=False)
    rows = [{"input_ids": [3 + i, 20, 9][: 2 + i % 2], "labels": i % 3} for i in range(30)]
    finetune(classifier, rows, epochs=12, **(FAST | {"learning_rate": 3e-3}))
    batch = collate(examples(classifier, rows))
    found = classifier(batch["input_ids"], batch["attention_mask"]).logits.argmax(-1)
    assert (found == batch["labels"]).float().mean() > 0.9


def test_a_masked_model_predicts_what_is_masked(make_model, word_tokenizer):
    model = make_model("masked-bert")
    with pytest.raises(CalibrationError, match="needs a tokenizer with a mask token"):
        examples(model, DATA, max_length=16)
    word_tokenizer.mask_token = "<s>"
    rows = examples(model, DATA, word_tokenizer, max_length=16)
    for row in rows:
        masked = row["labels"] != -100
        assert masked.any()
        assert (row["input_ids"][masked] == word_tokenizer.mask_token_id).all()
    again = examples(model, DATA, word_tokenizer, max_length=16)
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(rows, again, strict=True))


def test_padding_is_neither_seen_nor_predicted(make_model):
    rows = examples(make_model("llama"), [[3, 4, 5], [6]])
    batch = collate(rows)
    assert batch["labels"].tolist() == [[3, 4, 5], [6, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 11:
            raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_to_the_same_result(compressed, tmp_path, monkeypatch):
    arguments = {"tokens": 20 * 64, **FAST}
    whole = finetune(compressed("llama", "svd"), DATA, output_dir=tmp_path / "a", **arguments)
    original = training.SteadyTrainer.__init__

    def interrupted(self, **given):
        original(self, **given)
        self.add_callback(Interrupt())

    monkeypatch.setattr(training.SteadyTrainer, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(compressed("llama", "svd"), DATA, output_dir=tmp_path / "b", **arguments)
    monkeypatch.setattr(training.SteadyTrainer, "__init__", original)
    resumed = finetune(compressed("llama", "svd"), DATA, output_dir=tmp_path / "b", **arguments)
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(parameter, resumed.get_parameter(name), msg=name)


def test_a_loss_that_is_not_finite_goes_back_to_good_weights(compressed):
    model = compressed("llama", "svd")
    before = weights(model)
    with pytest.raises(TrainingError, match=r"the loss at step \d+ is not finite .*loss"):
        finetune(model, DATA, tokens=4096, **(FAST | {"learning_rate": 1e30}), max_grad_norm=0.0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    assert not model.training


def test_gradient_checkpointing_trains_the_same(compressed):
    models = [compressed("llama", "kron") for _ in range(2)]
    for model, saves in zip(models, (False, True), strict=True):
        finetune(model, DATA, tokens=256, activation_checkpointing=saves, **FAST)
    torch.testing.assert_close(loss(models[0]), loss(models[1]))


def test_the_same_seed_gives_the_same_model(compressed):
    first, second = (
        finetune(compressed("gpt2", "svd"), DATA, tokens=256, seed=3, **FAST) for _ in range(2)
    )
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tokens": 0}, "tokens=0; allowed"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
        ({"train": "some"}, "train='some'; allowed: all, factors"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong, message, compressed):
    with pytest.raises(OptionError, match=message):
        finetune(compressed("llama", "svd"), DATA, **(FAST | wrong))


def test_there_must_be_something_to_train(make_model):
    with pytest.raises(ModelError, match="tnlm did not compress"):
        finetune(make_model("llama"), DATA, train="factors", **FAST)
    with pytest.raises(ModelError, match="nothing is to be trained"):
        finetune(make_model("llama").requires_grad_(False), DATA, **FAST)
    with pytest.raises(CalibrationError, match="no tokens"):
        finetune(make_model("llama"), [], **FAST)
