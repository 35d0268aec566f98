"""Feed-forward layers are found by trying, whatever their matrices are called."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.targets.families import CONCATENATED, PLAIN, make
from tnlm.targets.feed_forward import feed_forward_layers
from tnlm.targets.signature import signature
from tnlm.targets.trial import Slabs

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kept(model):
    return [layer for layer in feed_forward_layers(model) if layer.reason is None]


@pytest.mark.parametrize("family", PLAIN)
def test_plain_layers_are_found_in_every_block(family):
    layers = kept(make(family))
    assert len(layers) == 2
    for layer in layers:
        assert layer.gates == ()
        assert {*layer.hidden.producers.values()} == {Slabs()}
        assert len(layer.producers) == 1 + (family in ("llama", "gated-t5", "lfm2"))
        assert not any("attention" in name for name in (*layer.producers, layer.reader))


@pytest.mark.parametrize("family", CONCATENATED)
def test_gates_and_values_of_one_module_are_found(family):
    layers = kept(make(family))
    assert len(layers) == 2
    for layer in layers:
        assert list(layer.hidden.producers.values()) == [Slabs(parts=2)]
        assert [first for _, first in layer.gates] == [True]
        assert layer.hidden.count == 48


@pytest.mark.parametrize(("family", "layers"), [("bitnet", [0, 1]), ("gemma3n", [0])])
def test_layers_that_mix_channels_are_refused(family, layers):
    refused = [layer for layer in feed_forward_layers(make(family)) if layer.reason is not None]
    assert [layer.reader for layer in refused] == [
        f"model.layers.{i}.mlp.down_proj" for i in layers
    ]
    assert all("mixes the channels" in layer.reason for layer in refused)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", ["bert", "nemotron", "phi3", "gemma3n", "gated-t5"])
def test_half_precision_finds_the_same(family, dtype):
    assert kept(make(family, dtype)) == kept(make(family))


@pytest.mark.parametrize("family", ["llama", "bert", "phi3", "opt"])
def test_nothing_need_be_allocated(family):
    with torch.device("meta"):
        model = make(family)
    assert feed_forward_layers(model) == feed_forward_layers(make(family))


class Gated(nn.Module):
    """Gates and values of one module, in some layout."""

    def __init__(self, halves, act=F.silu, width=12):
        super().__init__()
        self.both, self.back = nn.Linear(6, 2 * width), nn.Linear(width, 6)
        self.halves, self.act = halves, act

    def forward(self, x):
        gate, value = self.halves(self.both(x))
        return self.back(self.act(gate) * value)


def concatenated(x):
    return x.chunk(2, -1)


def interleaved(x):
    return x[..., ::2], x[..., 1::2]


def values_first(x):
    return x.chunk(2, -1)[::-1]


def crossed(x):
    first, second = x.chunk(2, -1)
    return first, second.flip(-1)


@pytest.mark.parametrize(
    ("halves", "slabs", "first"),
    [
        (concatenated, Slabs(parts=2), True),
        (values_first, Slabs(parts=2), False),
        (interleaved, Slabs(size=2), True),
    ],
)
@pytest.mark.parametrize("act", [F.silu, F.relu, lambda x: F.relu(x).square()])
@pytest.mark.parametrize("width", [2, 12, 16])
def test_layouts_of_gates(halves, slabs, first, act, width):
    [layer] = feed_forward_layers(nn.Sequential(Gated(halves, act, width)))
    assert (layer.reason, layer.hidden.producers) == (None, {"both": slabs})
    assert layer.gates == (("both", first),)


def test_channels_in_another_order_are_not_cut():
    [layer] = feed_forward_layers(nn.Sequential(Gated(crossed)))
    assert "mixes" in layer.reason


class Heads(nn.Module):
    """Attention over tokens, whose values and outputs have as many channels."""

    def __init__(self, over_tokens=True):
        super().__init__()
        self.v, self.o = nn.Linear(8, 8), nn.Linear(8, 8)
        self.over_tokens = over_tokens

    def forward(self, x):
        v = self.v(x).tanh()
        return self.o(v.cumsum(-2) if self.over_tokens else v)


def test_what_passes_from_token_to_token_is_no_feed_forward_layer():
    assert feed_forward_layers(nn.Sequential(Heads())) == []
    assert len(feed_forward_layers(nn.Sequential(Heads(over_tokens=False)))) == 1


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second((x + self.first(x)).relu())


def test_channels_of_the_residual_stream_are_not_cut():
    [layer] = feed_forward_layers(nn.Sequential(Residual()))
    assert "fewer groups" in layer.reason


def test_a_product_of_two_matrices_has_no_hidden_channels():
    assert feed_forward_layers(nn.Sequential(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 4)))) == []


def test_a_size_that_a_layer_remembers_is_found():
    class Split(Gated):
        def forward(self, x):
            gate, value = self.both(x).split(12, -1)
            return self.back(self.act(gate) * value)

    [layer] = feed_forward_layers(nn.Sequential(Split(concatenated)))
    assert "fewer groups" in layer.reason


def test_a_second_reader_of_the_channels_is_found():
    class Twice(Gated):
        def __init__(self):
            super().__init__(concatenated)
            self.other = nn.Linear(12, 6)

        def forward(self, x):
            gate, value = self.both(x).chunk(2, -1)
            hidden = self.act(gate) * value
            return self.back(hidden) + self.other(hidden)

    layers = feed_forward_layers(nn.Sequential(Twice()))
    assert layers
    assert all(layer.reason for layer in layers)


def test_a_kind_of_layer_is_tried_once(monkeypatch):
    from tnlm.targets import feed_forward

    tried = []
    probe = feed_forward.probe

    def counted(layer, reader, names):
        tried.append(reader)
        return probe(layer, reader, names)

    monkeypatch.setattr(feed_forward, "probe", counted)
    model = make("llama")
    assert len(feed_forward_layers(model)) == 2
    assert tried.count("down_proj") == 1
    model.model.layers[1].mlp.act_fn = nn.Softmax(-1)
    tried.clear()
    first, second = feed_forward_layers(model)
    assert tried.count("down_proj") == 2
    assert first.reason is None
    assert second.reason is not None


def test_signatures_pass_over_the_number_of_a_layer():
    model = make("llama")
    first, second = (signature(layer) for layer in model.model.layers)
    assert first == second
    other = copy.deepcopy(model.model.layers[0])
    other.mlp.scale = 2.0
    assert signature(other) != first


@pytest.mark.parametrize("family", ["bert", "phi3"])
def test_models_stay_as_they_are(family):
    model = make(family).train()
    before, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    feed_forward_layers(model)
    assert not calls
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
