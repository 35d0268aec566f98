import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tnlm.calibration.inputs import IGNORED
from tnlm.errors import ModelError
from tnlm.recovery.goals import HELD_OUT, divergence_from, hold_out, own_loss

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


def test_a_teacher_of_other_tokens_is_refused(make_model):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=99, num_attention_heads=1, **small))
    with pytest.raises(ModelError, match=r"\(2, 12, 99\).*give the dense model"):
        divergence_from(other)(make_model("llama"), BATCH)


@pytest.mark.parametrize("count", [1, 2, HELD_OUT, HELD_OUT + 1, 5 * HELD_OUT])
def test_every_batch_is_trained_on_or_measured(count):
    batches = [{"input_ids": torch.tensor([[i]])} for i in range(count)]
    shown, held = hold_out(batches)
    assert shown
    assert held
    if count > 1:
        assert len(shown) + len(held) == count
        assert not {id(batch) for batch in shown} & {id(batch) for batch in held}
