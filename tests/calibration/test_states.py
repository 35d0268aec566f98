from __future__ import annotations

import pytest
import torch

from tnlm.calibration.states import States


@pytest.mark.parametrize("on_disk", [False, True])
def test_states_are_replaced_one_by_one(tiny_llama, on_disk):
    first = [torch.randn(2, 3), torch.randn(2, 3)]
    states = States(tiny_llama(), first, on_disk=on_disk)
    other = States(tiny_llama(), states, on_disk=on_disk)
    states[0] = torch.zeros(2, 3)
    states[1] = torch.ones(4)  # of another size
    assert len(states) == 2
    assert [state.sum() for state in states] == [0, 4]
    assert all(map(torch.equal, other, first))
