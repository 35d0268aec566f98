from __future__ import annotations

import pytest
import torch

from tnlm.errors import CheckpointError
from tnlm.utils.spill import Spill


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 4)])
def test_tensors_come_back_in_any_order(dtype, shape):
    spill = Spill()
    tensors = [(torch.randn(shape) * 9).to(dtype) for _ in range(3)]
    slots = [spill.put(tensor) for tensor in tensors]
    for slot, tensor in reversed(list(zip(slots, tensors, strict=True))):
        found = spill.take(slot)
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


def test_what_is_written_is_a_copy():
    spill, tensor = Spill(), torch.ones(2, 3).T
    slot = spill.put(tensor)
    tensor.zero_()
    assert torch.equal(spill.take(slot), torch.ones(3, 2))


def test_a_file_that_is_cut_off_is_an_error():
    spill = Spill()
    slot = spill.put(torch.ones(8))
    spill._file.truncate(3)
    with pytest.raises(CheckpointError, match="the file ends too early"):
        spill.take(slot)


def test_space_is_used_again_for_the_same_size(tmp_path):
    spill = Spill(tmp_path)
    slot = spill.put(torch.ones(3))
    other = spill.put(torch.zeros(3))
    again = spill.put(torch.full((3,), 2.0), instead=slot)
    larger = spill.put(torch.ones(4), instead=other)
    assert again.offset == slot.offset
    assert larger.offset == 2 * slot.nbytes
    assert [spill.take(each).sum() for each in (again, other, larger)] == [6, 0, 4]
