from __future__ import annotations

import pytest

from tnlm.utils.names import block_of, place, split_at_block


@pytest.mark.parametrize(
    ("name", "number"),
    [("h.3.attn", 3), ("3.attn", 3), ("model.layers.10.experts.7.w1", 10), ("lm_head", None),
     ("fc1", None), ("w2.x", None)],
)  # fmt: skip
def test_a_block_is_the_first_number_of_a_name(name, number):
    assert block_of(name) == number


@pytest.mark.parametrize("name", ["model.layers.10.experts.7.w1", "3.attn", "lm_head", "w2.x"])
def test_a_split_name_can_be_put_together_again(name):
    split = split_at_block(name)
    if split is None:
        assert place(name) == (name, -1)
        return
    before, number, after = split
    assert ".".join([*filter(None, [before]), str(number), after]) == name
    assert place(name) == (f"{before}.{after}", number)
