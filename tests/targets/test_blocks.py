"""What "all-linear" means: the repeated blocks, not what stands around them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SqueezeBertConfig,
    SqueezeBertForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

import tnlm
from tnlm.errors import TargetError
from tnlm.targets.blocks import in_blocks
from tnlm.targets.selection import AROUND, select

BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
HEADS = BERT | {"num_attention_heads": 4}
OPT = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4}
T5 = {"vocab_size": 64, "d_model": 32, "d_ff": 48, "num_layers": 1, "num_heads": 4, "d_kv": 8}
ELECTRA = HEADS | {"embedding_size": 16}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
TOWER |= {"num_attention_heads": 4}

AROUND_BLOCKS = {
    "classifier": (
        lambda: BertForSequenceClassification(BertConfig(**HEADS)),
        {"bert.pooler.dense", "classifier"},
    ),
    "answers": (lambda: BertForQuestionAnswering(BertConfig(**HEADS)), {"qa_outputs"}),
    "masked": (lambda: BertForMaskedLM(BertConfig(**HEADS)), {"cls.predictions.transform.dense"}),
    "roberta": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**HEADS)),
        {"classifier.dense", "classifier.out_proj"},
    ),
    "electra": (
        lambda: ElectraForPreTraining(ElectraConfig(**ELECTRA)),
        {
            "electra.embeddings_project",
            "discriminator_predictions.dense",
            "discriminator_predictions.dense_prediction",
        },
    ),
    "albert": (
        lambda: AlbertForMaskedLM(AlbertConfig(**HEADS, embedding_size=16)),
        {"albert.encoder.embedding_hidden_mapping_in", "predictions.dense"},
    ),
    "llama-classes": (lambda: LlamaForSequenceClassification(LlamaConfig(**HEADS)), {"score"}),
    "llama-tags": (lambda: LlamaForTokenClassification(LlamaConfig(**HEADS)), {"score"}),
    "llama-answers": (lambda: LlamaForQuestionAnswering(LlamaConfig(**HEADS)), {"qa_outputs"}),
    "gpt2-classes": (
        lambda: GPT2ForSequenceClassification(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
        ),
        {"score"},
    ),
    "t5-classes": (
        lambda: T5ForSequenceClassification(T5Config(**T5)),
        {"classification_head.dense", "classification_head.out_proj"},
    ),
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(**OPT, num_hidden_layers=1, word_embed_proj_dim=16)),
        {"model.decoder.project_in", "model.decoder.project_out"},
    ),
    "clip": (
        lambda: CLIPModel(
            CLIPConfig(
                text_config=TOWER | {"vocab_size": 64},
                vision_config=TOWER | {"image_size": 8, "patch_size": 4},
                projection_dim=16,
            )
        ),
        {"visual_projection", "text_projection"},
    ),
}


@pytest.mark.parametrize(("make", "around"), AROUND_BLOCKS.values(), ids=AROUND_BLOCKS)
def test_what_stands_around_the_blocks_is_no_default_target(make, around):
    model = make()
    linear = {n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear -= {n for n, m in model.named_modules() if m is head}
    if not hasattr(model, "get_input_embeddings") or model.__class__ is CLIPModel:
        assert linear - in_blocks(model) == around
        return
    found = select(model)
    assert {name for name, why in found.skipped.items() if why == AROUND} == around
    assert {target.module for target in found.targets} == linear - around


def test_blocks_of_convolutions_do_not_make_the_head_a_target():
    model = SqueezeBertForSequenceClassification(SqueezeBertConfig(**HEADS, embedding_size=32))
    with pytest.raises(TargetError, match=r"pooler\.dense: outside the model's blocks") as error:
        select(model)
    assert "most parameters are in Conv1d, not linear modules" in str(error.value)
    assert [target.name for target in select(model, ["classifier"]).targets] == ["classifier"]


def test_they_are_reached_by_name():
    model = BertForSequenceClassification(BertConfig(**HEADS))
    found = select(model, ["all-linear", "pooler.dense"])
    assert "bert.pooler.dense" in {target.name for target in found.targets}
    assert set(found.skipped) == {"classifier"}
    assert [target.name for target in select(model, ["classifier"]).targets] == ["classifier"]
    assert not select(model, ["classifier"]).skipped


def test_a_published_rank_fits_a_classifier():
    model = BertForSequenceClassification(BertConfig(**HEADS))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tnlm.compress(model, "svd", rank=10)
    assert tuple(model.classifier.weight.shape) == (2, 32)
    for name in ("classifier.weight", "bert.pooler.dense.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert tnlm.report(model).plan.skipped["classifier"] == AROUND


class Tiny(BertForSequenceClassification):
    """Changed below to hold other structures."""


def with_body(body):
    model = Tiny(BertConfig(**HEADS))
    model.bert = body
    return model


def pair():
    return nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})


@pytest.mark.parametrize(
    ("body", "inside"),
    [
        (nn.ModuleList([pair()]), {"bert.0.up", "bert.0.down"}),
        (nn.Sequential(pair(), pair()), {f"bert.{i}.{n}" for i in (0, 1) for n in ("up", "down")}),
        (nn.Sequential(pair(), nn.Linear(4, 4)), set()),
        (nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), set()),  # heads
        (nn.ModuleList([nn.ModuleList([pair()])]), {"bert.0.0.up", "bert.0.0.down"}),
        (nn.ModuleDict({"layers": nn.ModuleList([pair()]), "out": nn.Linear(4, 4)}),
         {"bert.layers.0.up", "bert.layers.0.down"}),
    ],
)  # fmt: skip
def test_blocks_are_elements_of_lists_that_hold_modules(body, inside):
    model = with_body(body)
    assert {n for n in in_blocks(model) if type(model.get_submodule(n)) is nn.Linear} == inside


def test_lists_in_a_head_are_no_blocks_of_the_body():
    model = BertForSequenceClassification(BertConfig(**HEADS))
    model.classifier = nn.ModuleList([pair(), pair()])
    assert not any(name.startswith("classifier") for name in in_blocks(model))
