import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback, TrainingArguments

import tnlm.recovery
from tnlm.errors import OptionError, TrainingError
from tnlm.recovery.distillation import Distiller, distill, pair_layers
from tnlm.recovery.examples import batches, collate
from tnlm.recovery.lessons import Weights
from tnlm.recovery.model_kinds import examples_for

KINDS = ["llama", "gpt2", "masked-bert", "classifier"]
ALL = {"logits": 1.0, "hidden": 1.0, "attention": 1.0, "embedding": 1.0, "labels": 1.0}


@pytest.fixture
def distiller(tmp_path):
    """Make a Distiller; it is not trained."""

    def make(student, teacher, temperature=2.0, **weights):
        asked = Weights(**weights)
        return Distiller(
            model=student,
            teacher=teacher,
            weights=asked,
            temperature=temperature,
            layers=pair_layers(student, teacher, asked, None),
            args=TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True),
            data_collator=collate,
        )

    return make


def test_exposed():
    assert tnlm.recovery.distill is distill


def terms_of(trainer, batch):
    with trainer.attached(), torch.no_grad():
        return trainer.terms(trainer.model, dict(batch))[1]


def loss_of(trainer, batch):
    with trainer.attached(), torch.no_grad():
        return float(trainer.compute_loss(trainer.model, dict(batch)))


def moved(model, seed=1):
    """Return a copy with other parameters."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def uneven(kind):
    """Make data for a model of some kind: a short sequence and a long one."""
    if kind == "classifier":
        return [{"input_ids": [5, 6, 7], "label": 1}, {"input_ids": [4] * 9, "label": 2}]
    return [[5, 6, 7], [4, 5, 6, 7, 8, 9, 10, 11, 12]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_term_is_zero_if_and_only_if_both_agree(kind, model_of, data_of, distiller):
    teacher, given = model_of(kind), data_of(kind)
    (batch,) = batches(examples_for(teacher, **given), 99)
    agree = terms_of(distiller(copy.deepcopy(teacher), teacher, **ALL), batch)
    assert set(agree) == set(ALL)
    assert all(abs(float(value)) < 1e-6 for name, value in agree.items() if name != "labels")
    differ = terms_of(distiller(moved(teacher), teacher, **ALL), batch)
    assert all(float(value) > 1e-5 for value in differ.values())
    with torch.no_grad():
        wanted = teacher(**batch).loss
    torch.testing.assert_close(agree["labels"], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_change_the_loss(kind, model_of, data_of, distiller):
    teacher, given = model_of(kind), data_of(kind)
    trainer = distiller(moved(teacher), teacher, **ALL)
    short, long = examples_for(teacher, **(given | {"data": uneven(kind)})).items
    alone = terms_of(trainer, collate([short]))
    padded = collate([short, long])
    padded = {name: value[:1] for name, value in padded.items()}
    assert padded["attention_mask"].sum() < padded["attention_mask"].numel()
    for name, value in terms_of(trainer, padded).items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_weighted_sum(model_of, data_of, distiller):
    teacher = model_of("llama")
    student = moved(teacher)
    (batch,) = batches(examples_for(teacher, **data_of("llama")), 99)
    terms = terms_of(distiller(student, teacher, **ALL), batch)
    weights = {"logits": 0.5, "hidden": 2.0, "labels": 0.25}
    wanted = sum(weight * float(terms[name]) for name, weight in weights.items())
    assert loss_of(distiller(student, teacher, **weights), batch) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("preset", ["ilkd", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_few_steps_lower_the_loss(kind, preset, model_of, data_of, distiller):
    # Parameters as they are drawn are so small that any model does much the same.
    teacher, student, given = moved(model_of(kind)), model_of(kind, "svd"), data_of(kind)
    (batch,) = batches(examples_for(teacher, **given), 99)
    weights = ALL | {"logits": 0.0} if preset else {"logits": 1.0}
    before = loss_of(distiller(student, teacher, **weights), batch)
    frozen = copy.deepcopy(teacher.state_dict())
    given |= {"preset": preset, "epochs": 6, "learning_rate": 2e-3, "progress": False}
    assert distill(student, teacher, **given) is student
    assert loss_of(distiller(student.eval(), teacher, **weights), batch) < 0.95 * before
    assert all(torch.equal(value, frozen[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert student.config._attn_implementation == teacher.config._attn_implementation == "sdpa"


def test_logs_hold_each_term(model_of, data_of, caplog):
    given = data_of("gpt2") | {"progress": False, "batch_size": 4}
    with caplog.at_level(logging.INFO, logger="tnlm"):
        distill(model_of("gpt2", "kron"), model_of("gpt2"), **given, preset="ilkd")
    line = next(record.message for record in caplog.records if "step 1 of 4" in record.message)
    found = dict(part.split() for part in line.partition(": ")[2].split(", "))
    names = ("embedding", "attention", "hidden", "labels")
    assert float(found["loss"]) == pytest.approx(sum(float(found[n]) for n in names), rel=1e-3)
    assert "logits" not in found


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


def test_an_interrupted_distillation_goes_on_to_the_same_result(model_of, data_of, tmp_path):
    start, teacher = model_of("gpt2", "svd"), model_of("gpt2")
    given = data_of("gpt2") | {"preset": "ilkd", "batch_size": 2, "progress": False}
    whole = distill(copy.deepcopy(start), teacher, **given)
    given["output_dir"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        distill(copy.deepcopy(start), teacher, **given, callbacks=[Stop()])
    resumed = distill(copy.deepcopy(start), teacher, **given)
    wanted = whole.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in resumed.state_dict().items())
    with pytest.raises(tnlm.TnlmError, match="differs in temperature"):
        distill(start, teacher, **given, temperature=3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_activations_may_be_computed_again(kind, model_of, data_of):
    given = data_of(kind) | {"progress": False, "preset": "ilkd", "learning_rate": 1e-2}
    start, teacher = model_of(kind, "kron"), model_of(kind)
    found = [
        distill(copy.deepcopy(start), teacher, **given, activation_checkpointing=again)
        for again in (False, True)
    ]
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_adapters_learn(model_of, data_of):
    student = get_peft_model(model_of("llama", "svd"), LoraConfig(target_modules="all-linear"))
    before = {name: p.clone() for name, p in student.named_parameters()}
    given = data_of("llama") | {"progress": False, "preset": "ilkd", "learning_rate": 1e-2}
    distill(student, model_of("llama"), **given)
    changed = [name for name, p in student.named_parameters() if not p.equal(before[name])]
    assert changed
    assert all("lora_" in name for name in changed)


def test_a_teacher_may_be_in_half_precision(model_of, data_of):
    student, teacher = model_of("llama", "svd"), model_of("llama").bfloat16()
    distill(student, teacher, **data_of("llama"), preset="ilkd", logits=1.0, progress=False)
    assert all(bool(p.isfinite().all()) for p in student.parameters())


def test_layers_may_be_paired(tiny_llama, data_of):
    student, teacher = tiny_llama(), tiny_llama(num_hidden_layers=4, seed=1)
    given = data_of("llama") | {"progress": False, "hidden": 1.0}
    with pytest.raises(OptionError, match="student has 2 layers and the teacher 4"):
        distill(student, teacher, **given)
    with pytest.raises(OptionError, match=r"from \(0, 0\) to \(1, 3\)"):
        distill(student, teacher, **given, layers=[(0, 4)])
    distill(student, teacher, **given, attention=1.0, layers=[(0, 1), (1, 3)])


def test_logits_need_no_layers(tiny_llama, data_of):
    student, teacher = tiny_llama(), tiny_llama(num_hidden_layers=1, hidden_size=16)
    distill(student, teacher, **data_of("llama"), progress=False)
    with pytest.raises(OptionError, match="give one of these"):
        distill(student, teacher, **data_of("llama"), layers=[(0, 0)])


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"vocab_size": 70}, {}, "student has vocab_size=64 and the teacher vocab_size=70"),
        ({"num_attention_heads": 2}, {"attention": 1.0}, "num_attention_heads=4 .*heads=2"),
        ({"hidden_size": 16}, {"embedding": 1.0}, "hidden_size=32 .*hidden_size=16"),
        ({}, {"temperature": 0.0}, "temperature=0.0"),
        ({}, {"preset": "ikd"}, "did you mean 'ilkd'"),
        ({}, {"learning_rat": 1.0}, "did you mean 'learning_rate'"),
    ],
)
def test_refused_before_work(config, arguments, message, tiny_llama, data_of):
    student, teacher = tiny_llama(), tiny_llama(**config)
    with pytest.raises(OptionError, match=message):
        distill(student, teacher, **data_of("llama"), **arguments, progress=False)


def test_classes_must_agree(classifier, data_of):
    with pytest.raises(OptionError, match="num_labels=3 and the teacher num_labels=4"):
        distill(classifier(), classifier(num_labels=4), **data_of("classifier"), progress=False)


def test_models_of_different_kinds_do_not_pair(classifier, model_of, data_of):
    with pytest.raises(OptionError, match=r"BertForSequenceClassification .*BertForMaskedLM"):
        distill(classifier(), model_of("masked-bert"), **data_of("classifier"), progress=False)


def test_a_student_that_cannot_learn_is_refused(tiny_llama, data_of):
    student = tiny_llama().requires_grad_(False)
    with pytest.raises(OptionError, match="leaves no parameter"):
        distill(student, tiny_llama(), **data_of("llama"), progress=False)
    with pytest.raises(OptionError, match="its own teacher"):
        distill(student, student, **data_of("llama"), progress=False)


def test_a_lost_loss_restores_both(tiny_llama, data_of):
    student, teacher = tiny_llama(), tiny_llama(seed=1)
    with torch.no_grad():
        teacher.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="at step 0"):
        distill(student, teacher, **data_of("llama"), attention=1.0, progress=False)
    assert student.config._attn_implementation == "sdpa"
    assert teacher.config._attn_implementation == "sdpa"
