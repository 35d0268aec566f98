import copy

import pytest
import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tnlm.errors import ModelError
from tnlm.recovery.traces import Traces, log_probabilities, model_blocks

KINDS = ["llama", "gpt2", "bert", "masked-bert", "classifier"]
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
MASK = torch.ones_like(IDS)
MASK[1, 8:] = 0


def trace(model, **what):
    traces = Traces(model, **what)
    with torch.no_grad(), traces.attached(), traces.recording() as found:
        output = model(input_ids=IDS, attention_mask=MASK)
    return output, found


@pytest.mark.parametrize("before", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_those_of_eager_attention(kind, before, model_of):
    model = model_of(kind)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model(input_ids=IDS, attention_mask=MASK, output_attentions=True)
    model.set_attn_implementation(before)
    output, found = trace(model, maps=[0, 1])
    assert list(found.maps) == [0, 1]
    for index, wanted in enumerate(eager.attentions):
        torch.testing.assert_close(found.maps[index].exp(), wanted)
    kept = MASK.bool() if output[0].dim() == 3 else slice(None)
    torch.testing.assert_close(output[0][kept], eager[0][kept])


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_are_seen(kind, model_of):
    model = model_of(kind)
    _, found = trace(model, embedding=True, hidden=[1])
    torch.testing.assert_close(found.embedding, model.get_input_embeddings()(IDS))
    assert list(found.hidden) == [1]
    if "mlp" not in dict(model_blocks(model)[1][1].named_children()):
        with torch.no_grad():
            states = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True)
        torch.testing.assert_close(found.hidden[1], states.hidden_states[2])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_feed_forward_part_is_kept(kind, model_of):
    model = model_of(kind)
    seen = []
    model_blocks(model)[0][1].mlp.register_forward_hook(lambda _, __, out: seen.append(out))
    _, found = trace(model, hidden=[0])
    assert torch.equal(found.hidden[0], seen[0])


def test_nothing_remains(model_of):
    model = model_of("llama")
    names = [set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)]
    before = copy.deepcopy(model.config)
    with torch.no_grad():
        first = model(IDS).logits
    trace(model, embedding=True, hidden=[0], maps=[0])
    with pytest.raises(ZeroDivisionError), Traces(model, hidden=[0], maps=[0]).attached():
        _ = 1 / 0
    assert [set(ALL_ATTENTION_FUNCTIONS), set(ALL_MASK_ATTENTION_FUNCTIONS)] == names
    assert model.config._attn_implementation == before._attn_implementation
    assert model.config.to_dict() == before.to_dict()
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, first)


def test_nothing_is_kept_outside_a_recording(model_of):
    model = model_of("llama")
    traces = Traces(model, hidden=[0], maps=[0])
    with torch.no_grad(), traces.attached():
        with traces.recording() as found:
            pass
        model(IDS)
    assert not found.maps
    assert not found.hidden


def test_dropout_thins_the_output_but_not_the_map(model_of):
    model = model_of("llama")
    quiet = trace(model, maps=[0])[1].maps[0]
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    torch.manual_seed(0)
    output, found = trace(model.train(), maps=[0])
    assert torch.equal(found.maps[0], quiet)
    assert not torch.allclose(output.logits, trace(model.eval(), maps=[0])[0].logits)


def test_scores_may_be_bounded(gaussian):
    query, key = gaussian(1, 2, 3, 4), gaussian(1, 1, 3, 4, seed=1)
    scores = (query @ key.transpose(2, 3)) / 2
    for options, wanted in [
        ({}, scores),
        ({"softcap": 0.5}, 0.5 * (scores / 0.5).tanh()),
        ({"position_bias": gaussian(1, 2, 3, 3)}, scores + gaussian(1, 2, 3, 3)),
    ]:
        found = log_probabilities(query, key, None, **options)
        torch.testing.assert_close(found.double(), wanted.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_seen_is_refused(gaussian, tiny_llama):
    x = gaussian(1, 2, 3, 4)
    with pytest.raises(ModelError, match="sinks"):
        log_probabilities(x, x, None, s_aux=x)
    with pytest.raises(ModelError, match="not have exactly one stack"):
        model_blocks(torch.nn.Linear(2, 2))
    model = tiny_llama()
    model._can_set_attn_implementation = lambda: False
    with (
        pytest.raises(ModelError, match="does not use attention functions"),
        Traces(model, maps=[0]).attached(),
    ):
        pass
