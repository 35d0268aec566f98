"""torch.export writes one program for every batch and length, made of torch's own operations."""

from __future__ import annotations

import io
import operator

import pytest
import torch
from torch.export import Dim, export
from transformers.exporters import DynamoConfig
from transformers.exporters.exporter_dynamo import DynamoExporter

SIZES = [(2, 2), (5, 3), (1, 7), (4, 1), (3, 33)]
ANY = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


def test_every_batch_and_length_runs_in_one_program(pair, gaussian):
    program = export(pair.layer, (gaussian(3, 5, 16),), dynamic_shapes=ANY).module()
    for batch, length in SIZES:
        x = gaussian(batch, length, 16)
        torch.testing.assert_close(program(x), pair.dense(x), atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("seen", [1, 3])
def test_a_traced_layer_runs_with_every_number_of_tokens(seen, small_model):
    layer = small_model("llama", "svd").model.layers[0].mlp.up_proj
    traced = torch.jit.trace(layer, torch.randn(1, seen, layer.in_features))
    for length in (1, 3, 40):
        x = torch.randn(1, length, layer.in_features)
        torch.testing.assert_close(traced(x), layer(x))


def test_lookups_of_every_batch_and_length_run_in_one_program(table):
    program = export(table.layer, (torch.zeros(3, 5, dtype=torch.int64),), dynamic_shapes=ANY)
    for batch, length in SIZES:
        ids = torch.arange(batch * length).reshape(batch, length) % 24
        found = program.module()(ids)
        torch.testing.assert_close(found, table.dense(ids), atol=1e-9, rtol=1e-9)


def test_a_program_is_read_without_the_library(pair, gaussian):
    x, file = gaussian(3, 5, 16), io.BytesIO()
    program = export(pair.layer, (x,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    operations = {call for call in calls if call is not operator.getitem}  # a part of a result
    assert {operation.namespace for operation in operations} == {"aten"}
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file).module()
    torch.testing.assert_close(read(x), pair.dense(x), atol=1e-9, rtol=1e-9)


@pytest.mark.filterwarnings("ignore:.treespec.children_specs:FutureWarning")
@pytest.mark.parametrize(("kind", "scheme"), [("llama", "svd"), ("gpt2", "kron")])
def test_transformers_exports_a_compressed_model(kind, scheme, small_model):
    model = small_model(kind, scheme)
    exported = DynamoExporter().export(model, prompt(2, 5), config=DynamoConfig(dynamic=True))
    for batch, length in SIZES:
        asked = prompt(batch, length)
        with torch.no_grad():
            expected = model(**asked).logits
        found = exported(**asked).logits.detach()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def prompt(batch, length):
    ids = torch.arange(batch * length).reshape(batch, length) % 61 + 3
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
