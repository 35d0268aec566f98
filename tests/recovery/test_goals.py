import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from tnlm.calibration.inputs import IGNORED
from tnlm.errors import ModelError, OptionError
from tnlm.recovery.goals import HELD_OUT, check_teacher, divergence_from, hold_out, own_loss

IDS = torch.arange(24).reshape(2, 12) % 61 + 3
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


def test_the_divergence_is_that_of_the_predictions_that_count(make_model):
    teacher, model = make_model("llama"), make_model("llama")
    with torch.no_grad():
        model.lm_head.weight += torch.randn(model.lm_head.weight.shape) / 10
    labels = IDS.clone()
    labels[0, :5] = IGNORED
    with torch.no_grad():
        found = divergence_from(teacher)(model, {**BATCH, "labels": labels})
        p, q = (m(input_ids=IDS).logits[:, :-1].log_softmax(-1) for m in (teacher, model))
    rows = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(found, rows[labels[:, 1:] != IGNORED].mean())


def test_a_copy_diverges_by_nothing_and_no_label_is_read(make_model):
    model = make_model("llama")
    goal = divergence_from(copy.deepcopy(model))
    assert float(goal(model, BATCH).detach()) == pytest.approx(0, abs=1e-6)
    assert float(own_loss(model, BATCH).detach()) > 1


def test_classes_are_compared_one_a_row(classifier):
    model, teacher = classifier(), classifier()
    torch.nn.init.normal_(teacher.classifier.weight)
    found = divergence_from(teacher)(model, {**BATCH, "labels": torch.tensor([0, 2])})
    shown = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    p, q = (m(**shown).logits.log_softmax(-1) for m in (teacher, model))
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("words", [5, 99])
def test_a_teacher_of_other_tokens_is_refused(make_model, words):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=words, num_attention_heads=1, **small))
    with pytest.raises(ModelError, match=f"vocabulary of {words} and the model one of 64"):
        check_teacher(make_model("llama"), other)


@pytest.mark.parametrize("teacher", ["dense", 3])
def test_a_teacher_is_a_model(make_model, teacher):
    with pytest.raises(OptionError, match=r"teacher= is a (str|int); give the dense model"):
        check_teacher(make_model("llama"), teacher)


def test_logits_of_another_number_are_refused(classifier):
    with pytest.raises(ModelError, match=r"\(2, 5\).*\(2, 3\)"):
        divergence_from(classifier(num_labels=5))(classifier(), {**BATCH, "labels": IDS[:, 0] % 3})


def test_a_model_with_a_decoder_is_compared():
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    config.decoder_start_token_id = 0
    model, teacher = (T5ForConditionalGeneration(config).eval() for _ in range(2))
    labels = IDS[:, :5].contiguous()
    with torch.no_grad():
        found = divergence_from(teacher)(model, {**BATCH, "labels": labels})
        both = (m(input_ids=IDS, labels=labels).logits.log_softmax(-1) for m in (teacher, model))
    p, q = both
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("count", [1, 2, HELD_OUT, HELD_OUT + 1, 5 * HELD_OUT])
def test_every_batch_is_trained_on_or_measured(make_model, count):
    batches = [{"labels": torch.tensor([[i, i + 1]])} for i in range(count)]
    shown, held = hold_out(make_model("llama"), batches)
    assert shown
    assert held
    if count > 1:
        assert len(shown) + len(held) == count
        assert not {id(batch) for batch in shown} & {id(batch) for batch in held}


def test_batches_without_predictions_are_not_held_out(make_model):
    nothing = {"labels": torch.full((1, 4), IGNORED)}
    some = {"labels": torch.arange(4)[None]}
    shown, held = hold_out(make_model("llama"), [nothing, some, some])
    assert [batch is some for batch in shown] == [False, True]
    assert held == [some]
