from __future__ import annotations

import logging
import tempfile

import pytest
import torch
from torch import nn

from tnlm.calibration import backward
from tnlm.calibration.backward import stream
from tnlm.calibration.data import token_batches
from tnlm.calibration.loss import make_tasks
from tnlm.targets.selection import select

IDS = torch.arange(96) * 7 % 61 + 3
BATCHES = token_batches(IDS, max_length=16, batch_size=2)
RAGGED = token_batches([[3, 4, 5, 6], [7, 8, 9], [10, 11]], batch_size=2)
UP, HEAD = "model.layers.1.mlp.up_proj", "lm_head"


class Shortcut(nn.Module):
    """A block that adds what the block before it has left aside, as in U-shaped models."""

    def __init__(self, block, aside):
        super().__init__()
        self.block, self.aside = block, aside

    def forward(self, hidden_states, **arguments):
        earlier = self.aside.pop() if self.aside else 0.0
        self.aside.extend([] if isinstance(earlier, torch.Tensor) else [hidden_states])
        return self.block(hidden_states + earlier, **arguments)


class Late(nn.Module):
    """A last norm that also sees the first block's output, which no block is told of."""

    def __init__(self, norm, first):
        super().__init__()
        self.norm, self.seen = norm, []
        first.register_forward_hook(lambda _, __, output: self.seen.append(output))

    def forward(self, x):
        return self.norm(x + self.seen[-1])


class InPlace(nn.Module):
    """A block that overwrites its input, and what its linear layer gives."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, hidden_states, **_):
        return hidden_states.mul_(1.5).add_(self.inner(hidden_states.clone()).relu_())


class Positions(nn.Module):
    """Adds a projection of positions, which does not depend on tokens."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.projection = inner, nn.Linear(32, 32)

    def forward(self, x):
        table = torch.linspace(-1, 1, x.shape[1])[:, None].expand(-1, 32)
        return self.inner(x + self.projection(table))


def modules_of(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


def gradients(model, batches=BATCHES, modules=None):
    """The gradient at each module's output, batch after batch, and the shares."""
    found = {}

    def see(name, x, output, mask):
        assert not model.training
        assert (mask is None) == (batches is not RAGGED or len(x) == 1)
        output.register_hook(lambda g: found.setdefault(name, []).append(g.clone()))

    tasks = make_tasks(model, batches, "data")
    shares = list(stream(model, modules or modules_of(model), tasks, see))
    return found, shares


def direct(model, batches=BATCHES, modules=None):
    """The same from ordinary backward passes."""
    modules, found, outputs = modules or modules_of(model), {}, {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            # A copy, as the model may go on in place.
            lambda _, __, out, name=name: outputs.update({name: out}) or out.clone()
        )
        for name in modules
    ]
    for task in make_tasks(model, batches, "data"):
        loss = task.loss(model, model(**task.batch))
        slopes = torch.autograd.grad(loss, [outputs[name] for name in modules])
        for name, g in zip(modules, slopes, strict=True):
            found.setdefault(name, []).append(g)
    for handle in handles:
        handle.remove()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        assert len(parts) == len(expected[name])
        for part, wanted in zip(parts, expected[name], strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(part, wanted, rtol=0, atol=1e-5 * scale)


@pytest.fixture
def walked(monkeypatch):
    """Count the walks."""
    counts = []
    real = backward._walk
    monkeypatch.setattr(backward, "_walk", lambda *a: counts.append(len(a[1])) or real(*a))
    return counts


@pytest.mark.parametrize("kind", ["llama", "tied-llama", "gpt2", "masked-bert"])
def test_walking_takes_the_gradients_of_whole_passes(kind, make_model, walked):
    model = make_model(kind)
    found, shares = gradients(model)
    assert walked == [2]
    assert_same(found, direct(model))
    assert sum(shares) == pytest.approx(len(BATCHES))
    assert shares.count(0.0) == 2


def test_walking_goes_from_the_last_block_to_the_first_watched(make_model, walked):
    model, runs = make_model("llama"), []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.append(index))
    found, shares = gradients(model, modules=[UP])
    assert walked == [2]
    assert_same(found, direct(model, modules=[UP]))
    assert sum(shares) == pytest.approx(len(BATCHES))
    runs.clear()
    found, shares = gradients(model)
    ends = [index for index, share in enumerate(shares) if share == 0]
    assert ends == [3 * len(BATCHES), 4 * len(BATCHES) + 1]  # two blocks forwards, one back
    assert runs[-2 * len(BATCHES) :] == [1] * len(BATCHES) + [0] * len(BATCHES)
    gradients(model, modules=[UP])
    assert runs[-3 * len(BATCHES) :] == [0] * len(BATCHES) + [1] * 2 * len(BATCHES)


def test_a_head_takes_passes_of_its_own_without_a_graph_below(make_model, walked):
    model, graphs = make_model("llama"), []
    model.model.norm.register_forward_hook(lambda _, __, out: graphs.append(out.requires_grad))
    gradients(model, modules=[HEAD])
    assert graphs == [False] * len(BATCHES)
    found, shares = gradients(model, modules=[UP, HEAD])
    assert graphs[-len(BATCHES) :] == [False] * len(BATCHES)
    assert walked == [2]
    assert_same(found, direct(model, modules=[UP, HEAD]))
    assert sum(shares) == pytest.approx(len(BATCHES))


def test_padding_takes_whole_passes_with_the_mask(make_model, walked):
    model = make_model("llama")
    found, shares = gradients(model, RAGGED)
    assert walked == []
    assert_same(found, direct(model, RAGGED))
    assert shares == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[:1]], ids=["many", "one"])
def test_blocks_that_depend_on_more_fall_back_to_whole_passes(batches, make_model, walked):
    model, aside = make_model("llama"), []
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Shortcut(block, aside)
    assert_same(gradients(model, batches)[0], direct(model, batches))
    assert walked == []


def test_a_way_past_the_blocks_falls_back_to_whole_passes(make_model, walked, caplog):
    caplog.set_level(logging.INFO, logger="tnlm")
    model = make_model("llama")
    model.model.norm = Late(model.model.norm, model.model.layers[0])
    found, _ = gradients(model)
    assert walked == []
    assert "blocks are linked by more than the hidden state" in caplog.text
    assert_same(found, direct(model))


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "whole"])
def test_models_that_work_in_place(batches, make_model):
    model = make_model("llama")
    torch.manual_seed(1)
    model.model.layers = nn.ModuleList([InPlace(), InPlace()])
    names = [f"model.layers.{index}.inner" for index in range(2)]
    assert_same(gradients(model, batches, names)[0], direct(model, batches, names))


def test_modules_whose_input_depends_on_no_token(make_model, walked):
    model = make_model("llama")
    torch.manual_seed(1)
    model.model.layers[1].mlp = Positions(model.model.layers[1].mlp)
    name = "model.layers.1.mlp.projection"
    found, _ = gradients(model, modules=[name])
    assert walked == [2]
    assert_same(found, direct(model, modules=[name]))


@pytest.mark.parametrize("error", [None, RuntimeError("broken")])
def test_spilled_states_are_removed(error, make_model, walked, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, spilled = make_model("llama"), []

    def see(*_):
        spilled.append(len(list(tmp_path.iterdir())))
        if error is not None:
            raise error

    def run():
        list(stream(model, [UP], make_tasks(model, BATCHES), see))

    if error is None:
        run()
    else:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    assert walked == [2]
    assert set(spilled) == {0}  # the file has no name
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "whole"])
def test_giving_up_halfway_leaves_the_model_as_it_was(batches, make_model):
    def state():
        return [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]

    model = make_model("llama").train()
    model.lm_head.requires_grad_(False)
    before = state()
    with torch.no_grad():
        passes = stream(model, [UP], make_tasks(model, batches), lambda *_: None)
        next(passes)
        assert state() != before
        passes.close()
        assert not torch.is_grad_enabled()
    assert state() == before
