from __future__ import annotations

import pytest
import torch

from tnlm.calibration.bypass import Bypass, bypassed

IDS = torch.arange(6).reshape(1, 6) + 3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_head_reads_the_state_that_is_given(kind, make_model):
    model = make_model(kind)
    name = "model.layers" if kind == "llama" else "transformer.h"
    blocks = [(f"{name}.{n}", block) for n, block in enumerate(model.get_submodule(name))]
    found = []
    handle = blocks[-1][1].register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        expected = model(IDS).logits
        [like] = found
        state = like[0] if isinstance(like, tuple) else like
        with bypassed(model, blocks, like, state):
            assert torch.equal(model(IDS).logits, expected)
    assert len(found) == 1  # no block ran again
    handle.remove()
    assert [model.get_submodule(name) for name, _ in blocks] == [block for _, block in blocks]


def test_a_bypass_answers_for_its_block():
    block = torch.nn.Linear(2, 3)
    made = Bypass(block, like=(torch.ones(1), None))
    assert made.in_features == 2
    assert made(torch.zeros(1)) == (torch.zeros(1), None)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = made.no_such_name


def test_blocks_return_after_an_error():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    block = model[0]
    with pytest.raises(RuntimeError, match="stop"), bypassed(model, [("0", block)], None):
        raise RuntimeError("stop")
    assert model[0] is block
