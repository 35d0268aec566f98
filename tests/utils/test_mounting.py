from __future__ import annotations

import pytest
from torch import nn

from tnlm.utils.mounting import modules_kept


def test_modules_come_back_when_a_block_fails():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    own = list(model)

    def fails():
        with modules_kept(model, ["0", "1"]) as found:
            assert list(found.values()) == own
            model[0], model[1] = nn.Identity(), nn.Identity()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert list(model) == own


def test_a_module_that_is_missing_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(AttributeError), modules_kept(model, ["0", "7"]):
        pass
