from __future__ import annotations

import pytest
import torch

from tnlm.errors import OptionError, RankError
from tnlm.recovery.adapters import adapted, check_adapters
from tnlm.targets import select

IDS = torch.arange(32).reshape(1, 32) + 3


def linear(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


def state(model):
    return (
        [(n, id(p), p.requires_grad, p._version) for n, p in model.named_parameters()],
        [(n, id(m), m.training, sorted(vars(m))) for n, m in model.named_modules()],
    )


@pytest.mark.parametrize("kind", ["tied-llama", "gpt2", "masked-bert"])
@pytest.mark.parametrize("fails", [False, True])
def test_adapters_leave_no_trace(kind, fails, make_model):
    model = make_model(kind)
    next(model.parameters()).requires_grad_(False)
    before, logits = state(model), model(IDS).logits
    try:
        with adapted(model, linear(model), 4, 8) as adapters:
            torch.testing.assert_close(model(IDS).logits, logits)  # B = 0
            trained = {id(p) for p in model.parameters() if p.requires_grad}
            assert trained == {id(p) for a in adapters.values() for p in (a.down, a.up)}
            with torch.no_grad():
                for adapter in adapters.values():
                    adapter.up.fill_(0.1)
            moved = model(IDS).logits
            assert not torch.allclose(moved, logits, atol=1e-3)
            model.train()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state(model) == before
    assert torch.equal(model(IDS).logits, logits)
    assert {a.scale for a in adapters.values()} == {2.0}
    assert adapters.keys() == set(linear(model))


def test_half_precision_is_trained_in_float32(tiny_llama):
    model = tiny_llama().to(torch.bfloat16)
    with adapted(model, linear(model), 4, 8) as adapters:
        assert {a.up.dtype for a in adapters.values()} == {torch.float32}
        assert model(IDS).logits.dtype == torch.bfloat16
    assert next(iter(adapters.values())).merged().dtype == torch.float32


def test_what_is_refused(tiny_llama):
    model = tiny_llama()
    names = linear(model)
    check_adapters(model, names, 16, 1)
    with pytest.raises(RankError, match=r"k_proj: rank=17, but an adapter here takes 1 to 16"):
        check_adapters(model, names, 17, 1)
    with pytest.raises(OptionError, match="alpha=0"):
        check_adapters(model, names, 4, 0)
