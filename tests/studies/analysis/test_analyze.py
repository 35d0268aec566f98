from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM

import tnlm
from tnlm.calibration.data import token_batches
from tnlm.errors import CalibrationError, ModelError, OptionError, TargetError
from tnlm.studies.analysis.analyze import EMBEDDING
from tnlm.targets.selection import select

IDS = torch.arange(256) % 61 + 3
DATA = {"max_length": 32, "progress": False}
RAGGED = [[3, 4, 5, 6], [7, 8, 9], [10, 11]]


def analyze(model, calibration=None, **arguments):
    return tnlm.analyze(model, calibration, **DATA | arguments)


def outputs_of(model, target, batches):
    """All outputs of a target at once, without its bias."""
    seen = []
    module = model.get_submodule(target.module)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    x = torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])
    return x.double() @ target.weight(model).double().T


def state_of(model):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    return weights, flags, grads, torch.get_rng_state()


def assert_same(before, after):
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:3] == after[1:3]
    assert torch.equal(before[3], after[3])


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2", "bert", "masked-bert"])
def test_every_matrix_of_every_model_has_its_rows(kind, make_model):
    model = make_model(kind).train()
    before = state_of(model)
    found = analyze(model, IDS, formats=["low-rank"])
    assert_same(before, state_of(model))
    targets = select(model).targets
    assert [(row.name, row.shape) for row in found.weights] == [(t.name, t.shape) for t in targets]
    for row, target in zip(found.weights, targets, strict=True):
        singular = torch.linalg.svdvals(target.weight(model).double())
        stable = float(singular.square().sum() / singular[0] ** 2)
        assert row.spectrum.stable_rank == pytest.approx(stable)
    assert len(found.features) == 4 * len(targets)
    assert {row.name for row in found.curves} == {t.name for t in targets}
    assert {row.metric for row in found.curves} == {"identity", "input"}
    assert found.skipped == select(model).skipped
    assert found.protocol["tokens"] == 256


@pytest.mark.parametrize("kind", ["llama", "gpt2", "masked-bert"])
def test_features_are_the_outputs_on_data(kind, make_model):
    model = make_model(kind)
    batches = token_batches(IDS, max_length=32, num_samples=16)
    features = {row.name: row for row in analyze(model, IDS).features if row.centered}
    for target in select(model).targets[:7]:
        y = outputs_of(model, target, batches)
        energy = torch.linalg.svdvals(y - y.mean(0)).square()
        rows = [r for r in analyze(model, IDS).features if r.name == target.name and r.centered]
        stable = float(energy.sum() / energy[0])
        assert rows[0].spectrum.stable_rank == pytest.approx(stable, rel=1e-4)
        assert features[target.name].inputs == 256


def test_padding_does_not_count(make_model):
    found = analyze(make_model("llama"), RAGGED)
    assert {row.inputs for row in found.features} == {9}
    assert all(row.note.startswith("only 9 inputs for") for row in found.features)


def test_a_pooler_has_one_input_for_a_sequence(make_model):
    model = make_model("bert")
    batches = token_batches(IDS, max_length=32)
    [target] = select(model, ["pooler.dense"]).targets
    y = outputs_of(model, target, batches)
    energy = torch.linalg.svdvals(y - y.mean(0)).square()
    found = analyze(model, IDS, targets=["pooler.dense"]).features
    assert found[0].inputs == len(y) == 8
    stable = float(energy.sum() / energy[0])
    assert found[2].spectrum.stable_rank == pytest.approx(stable, rel=1e-4)


def test_a_module_that_all_blocks_share_has_several_inputs_for_a_token():
    sizes = {"vocab_size": 64, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 24}
    torch.manual_seed(0)
    config = AlbertConfig(**sizes, num_hidden_layers=3, num_attention_heads=2)
    found = analyze(AlbertForMaskedLM(config).eval(), IDS)
    counts = {row.name: row.inputs for row in found.features}
    shared = [name for name in counts if name.endswith("ffn_output")]
    assert [counts[name] for name in shared] == [3 * 256]
    assert all(row.spectrum.stable_rank >= 1.0 for row in found.features)


class Routed(nn.Module):
    """Gives the tokens above a mean to its part once more, as a router gives some to an expert."""

    def __init__(self, part):
        super().__init__()
        self.part, self.routed = part, 0

    def forward(self, x):
        some = x[x.mean(-1) > 0]
        self.routed += len(some)
        self.part(some)
        return self.part(x)


def test_inputs_that_depend_on_the_data_are_counted_as_they_come(make_model):
    model = make_model("llama")
    routed = Routed(model.model.layers[0].mlp)
    model.model.layers[0].mlp = routed
    found = analyze(model, IDS)
    [count] = {row.inputs for row in found.features if ".0.mlp.part.up_proj" in row.name}
    routed.routed = 0
    with torch.no_grad():
        for batch in token_batches(IDS, max_length=DATA["max_length"]):
            model(batch["input_ids"])
    assert count == len(IDS) + routed.routed > len(IDS)
    others = {row.inputs for row in found.features if ".1.mlp.up_proj" in row.name}
    assert others == {len(IDS)}


def test_embeddings_have_weights_and_no_features(make_model):
    found = analyze(make_model("gpt2"), IDS, targets=["wte", "c_proj"])
    assert found.skipped == {"transformer.wte": EMBEDDING}
    assert "transformer.wte" in {row.name for row in found.weights}
    alone = analyze(make_model("gpt2"), IDS, targets="embeddings")
    assert alone.features == ()


def test_a_planted_rank_is_found_in_weights_and_features(make_model):
    model = make_model("llama")
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight.copy_(weight[:, :3] @ weight[:3])
    found = analyze(model, IDS, targets=["up_proj"])
    row = found.weights[1]
    assert row.spectrum.numerical_rank == 3
    assert row.spectrum.k90 <= 3
    assert all(r.spectrum.k90 <= 3 for r in found.features if r.name == row.name)


def test_what_is_chosen_and_ignored_is_as_in_compress(make_model):
    found = analyze(make_model("llama"), targets=["q_proj", "k_proj"], ignore=["k_proj"])
    assert [row.name.rpartition(".")[2] for row in found.weights] == ["q_proj", "q_proj"]
    with pytest.raises(TargetError, match="no matrix matches"):
        analyze(make_model("llama"), targets=["nothing"])


def test_text_needs_a_tokenizer(make_model, word_tokenizer, word_text):
    found = analyze(make_model("llama"), [word_text(200)], tokenizer=word_tokenizer)
    assert found.protocol["tokens"] == 192
    with pytest.raises(CalibrationError, match="tokenizer="):
        analyze(make_model("llama"), [word_text(200)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(bad, make_model):
    model = make_model("gpt2")
    model.transformer.h[1].attn.c_attn.weight.data[3, 40] = bad
    with pytest.raises(ModelError, match=r"h\.1\.attn\.c_attn\.k holds 1 NaN or infinite"):
        analyze(model)


def test_activations_that_are_not_finite_are_refused(make_model):
    model = make_model("llama").train()
    model.model.norm.weight.requires_grad_(False)
    model.model.layers[0].input_layernorm.weight.data[0] = float("nan")
    before = state_of(model)[1:3]
    with pytest.raises(CalibrationError, match="not finite"):
        analyze(model, IDS)
    assert state_of(model)[1:3] == before


def test_formats_are_checked_before_any_work(make_model):
    with pytest.raises(OptionError, match="unknown format 'kroneker'; did you mean 'kronecker'"):
        analyze(make_model("llama"), formats=["kroneker"])
    with pytest.raises(OptionError, match=r"formats='low-rank'; allowed: a list of names"):
        analyze(make_model("llama"), formats="low-rank")
    with pytest.raises(OptionError, match=r"'token-mps', which only replaces embedding; the targ"):
        analyze(make_model("llama"), formats=["token-mps"])
