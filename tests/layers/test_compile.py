"""torch.compile meets one graph without breaks, whatever the batch and the length.

Backends "eager" and "aot_eager" trace as the default one does, and need no compiler for C++.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

SIZES = [(2, 5), (3, 7), (4, 9), (2, 12), (5, 3), (6, 20), (7, 33)]
ATOL = 1e-9


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch._dynamo.reset()


def count_compiles(module, inputs, expected, **tolerances):
    """Return the number of graphs that a module is compiled to over several inputs."""
    counter = CompileCounter()
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(compiled(x), expected(x), **tolerances)
    return counter.frame_count


def test_seven_sizes_take_two_compiles(pair, gaussian):
    inputs = [gaussian(*size, 16) for size in SIZES]
    assert count_compiles(pair.layer, inputs, pair.dense, atol=ATOL, rtol=ATOL) == 2


def test_seven_sizes_of_a_lookup_take_two_compiles(table):
    inputs = [torch.arange(batch * length).reshape(batch, length) % 24 for batch, length in SIZES]
    assert count_compiles(table.layer, inputs, table.dense, atol=ATOL, rtol=ATOL) == 2


def test_single_tokens_take_one_more_compile(linear, gaussian):
    inputs = [gaussian(2, length, 16) for length in (5, 1, 7, 1, 9)]
    assert count_compiles(linear.layer, inputs, linear.dense, atol=ATOL, rtol=ATOL) == 3


def test_a_dense_layer_takes_as_many(gaussian):
    dense = torch.nn.Linear(16, 24).double()
    inputs = [gaussian(2, length, 16) for length in (5, 1, 7, 1, 9)]
    assert count_compiles(dense, inputs, dense) == 3


def test_compiled_gradients_are_the_same(pair, gaussian):
    compiled = torch.compile(pair.layer, backend="aot_eager", fullgraph=True)
    x, found = gaussian(3, 4, 16), []
    for layer in (compiled, pair.layer):
        wanted = [x.requires_grad_(), *pair.layer.parameters()]
        found.append(torch.autograd.grad(layer(x).square().sum(), wanted))
    torch.testing.assert_close(*found, atol=1e-7, rtol=ATOL)


@pytest.mark.parametrize(("kind", "scheme"), [("llama", "svd"), ("gpt2", "kron")])
def test_a_compressed_model_is_one_graph_for_every_length(kind, scheme, small_model):
    model = small_model(kind, scheme)

    def logits(ids):
        return model(ids, use_cache=False).logits

    inputs = [torch.arange(2 * n).reshape(2, n) % 61 + 3 for n in (5, 7, 9, 12, 20, 33, 40)]
    assert count_compiles(logits, inputs, logits, atol=1e-5, rtol=1e-5) == 2
