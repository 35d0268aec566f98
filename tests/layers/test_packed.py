"""Packed layers: the weight that was rounded, products equal to those with it, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tnlm.layers.packed import Packed, PackedEmbedding, PackedHead, PackedLinear
from tnlm.layers.packing import packed, unpacked
from tnlm.precision.grid import Precision
from tnlm.precision.kernels import TOKENS, has_kernel
from tnlm.precision.rounding import nearest

GRIDS = [Precision(8, None), Precision(8, 16, False), Precision(4), Precision(3, 16, False)]


def made(grid, rows=12, columns=48, dtype=torch.float32, bias=True):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    layer = PackedLinear(rows, columns, grid, bias=bias, dtype=dtype)
    rounded = nearest(weight, grid)
    return layer.store(rounded, torch.randn(rows, generator=generator)), rounded


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_weight_is_what_was_rounded(grid):
    layer, rounded = made(grid)
    assert torch.allclose(layer.weight.double(), rounded.values(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, TOKENS, TOKENS + 1])
def test_the_product_is_that_with_the_weight(grid, dtype, tokens):
    layer, _ = made(grid, dtype=dtype)
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        wanted = F.linear(x.double(), layer.weight.double(), layer.bias.double())
        apart = (layer(x).double() - wanted).abs().max() / wanted.abs().max()
    assert float(apart) < (1e-5 if dtype is torch.float32 else 2e-2)


@pytest.mark.parametrize("columns", [40, 100, 8, 33])
def test_widths_that_the_kernel_cannot_read_go_through_the_weight(columns):
    grid = Precision(8, None)
    assert not has_kernel(torch.zeros(1, columns, dtype=torch.bfloat16), grid)
    layer, _ = made(grid, columns=columns, dtype=torch.bfloat16)
    assert bool(layer(torch.randn(1, columns).bfloat16()).isfinite().all())


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("offset", [2, 8, 56])
@torch.no_grad()
def test_memory_that_starts_anywhere_gives_the_same(tokens, offset):
    layer, _ = made(Precision(8, None), dtype=torch.bfloat16)  # its kernel reads aligned memory
    x = torch.randn(tokens, 48).bfloat16()
    wanted = layer(x)
    layer.codes = moved_by(offset, layer.codes)
    assert torch.equal(layer(moved_by(offset, x)), wanted)
    assert torch.equal(layer(torch.cat([x, x], 1)[:, 48:]), wanted)


def moved_by(offset, tensor):
    """Return a copy whose memory starts some bytes behind a multiple of 64."""
    held = torch.empty(tensor.nbytes + 128, dtype=torch.uint8)
    start = -held.data_ptr() % 64 + offset
    copy = held[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def test_an_empty_batch_gives_no_rows():
    layer, _ = made(Precision(8, None), dtype=torch.bfloat16)
    assert layer(torch.zeros(0, 48, dtype=torch.bfloat16)).shape == (0, 12)


def test_inputs_and_scales_get_gradients_and_codes_stay():
    layer, _ = made(Precision(8, None), dtype=torch.bfloat16)
    before = layer.codes.clone()
    x = torch.randn(2, 48).bfloat16().requires_grad_()
    layer(x).float().square().sum().backward()
    assert x.grad is not None
    assert layer.scales.grad is not None
    assert torch.equal(layer.codes, before)


def test_dtypes_change_scales_alone():
    layer, _ = made(Precision(4))
    codes = layer.codes.clone()
    layer.half()
    assert layer.scales.dtype is torch.float16
    assert torch.equal(layer.codes, codes)


def test_a_table_puts_only_its_rows_together():
    grid = Precision(4, 16, False)
    table = PackedEmbedding(10, 48, grid).store(nearest(torch.randn(10, 48), grid))
    ids = torch.tensor([[1, 9], [0, 1]])
    assert torch.equal(table(ids), F.embedding(ids, table.weight))


def test_a_head_reads_the_codes_of_its_table_in_copies_too():
    grid = Precision(4)
    table = PackedEmbedding(10, 48, grid).store(nearest(torch.randn(10, 48), grid))
    model = nn.ModuleDict({"table": table, "head": PackedHead().share(table)})
    hidden = torch.randn(2, 48)
    assert torch.allclose(model["head"](hidden), F.linear(hidden, table.weight), atol=1e-4)
    assert not list(model["head"].parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin["table"].scales.mul_(2.0)
    assert torch.allclose(twin["head"](hidden), 2 * model["head"](hidden))


def test_unpacking_returns_plain_layers_with_the_same_weight():
    model = nn.Sequential(nn.Linear(48, 12), nn.Embedding(10, 48, padding_idx=3))
    made_packed = packed(model, {"0": Precision(4), "1": Precision(8)})
    for layer in made_packed:
        layer.store(nearest(torch.randn(layer.codes.shape[0], 48), layer.precision))
    weights = [layer.weight.detach().clone() for layer in made_packed]
    plain = unpacked(made_packed)
    assert not any(isinstance(module, Packed) for module in plain.modules())
    assert plain[1].padding_idx == 3
    assert all(torch.equal(a.weight, b) for a, b in zip(plain, weights, strict=True))
