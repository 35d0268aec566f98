from __future__ import annotations

import pytest
import torch

from tnlm.calibration.padding import padding_of
from tnlm.errors import CalibrationError

HALF = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
FULL = torch.ones(2, 4, dtype=torch.int64)
IMAGES = torch.zeros(2, 3, 8, 8)


def count(padding, *shape):
    return len(padding.counted("layer", torch.zeros(*shape, 5)))


def test_full_masks_are_no_padding():
    assert padding_of({"input_ids": FULL, "attention_mask": FULL}) is None
    assert padding_of({"pixel_values": IMAGES}) is None


def test_rows_of_text_are_those_of_the_mask_flat_or_not():
    padding = padding_of({"input_ids": FULL, "attention_mask": HALF})
    assert count(padding, 2, 4) == count(padding, 8) == 3
    assert count(padding, 2) == 2  # a pooler has one row a sequence
    with pytest.raises(CalibrationError, match=r"rows of layer, of shape \(2, 5, 5\)"):
        count(padding, 2, 5)


def test_what_is_no_text_has_no_padding():
    batch = {"input_ids": FULL, "attention_mask": HALF, "pixel_values": IMAGES}
    padding = padding_of(batch)
    assert (count(padding, 2, 4), count(padding, 2, 17)) == (3, 34)


def test_two_sides_are_told_apart_by_their_length_or_refused():
    batch = {"input_ids": FULL, "attention_mask": HALF, "labels": torch.zeros(2, 3)}
    padding = padding_of(batch)
    assert (count(padding, 2, 4), count(padding, 2, 3)) == (3, 6)
    alike = padding_of(batch | {"decoder_input_ids": FULL})
    with pytest.raises(CalibrationError, match="cannot be matched"):
        count(alike, 2, 4)
