"""ONNX programs of compressed models compute what the models do, in onnxruntime."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim
from transformers.exporters import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

pytestmark = pytest.mark.filterwarnings("ignore:.*(LeafSpec|children_specs):FutureWarning")


def test_every_layer_is_translated(pair, gaussian):
    layer, tokens = pair.to(torch.float32).layer.eval(), Dim("tokens")
    x = gaussian(5, 16).float()
    program = torch.onnx.export(
        layer, (x,), dynamo=True, dynamic_shapes=({0: tokens},), optimize=False, verbose=False
    )
    for count in (5, 2, 9):
        x = gaussian(count, 16).float()
        [found] = program(x)
        torch.testing.assert_close(found, layer(x).detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheme"), [("llama", "svd"), ("gpt2", "kron")])
def test_transformers_translates_a_compressed_model(kind, scheme, small_model, tmp_path):
    model = small_model(kind, scheme)

    def prompt(batch, length):
        ids = torch.arange(batch * length).reshape(batch, length) % 61 + 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    exported = OnnxExporter().export(model, prompt(2, 5), config=OnnxConfig(dynamic=True))
    exported.save_pretrained(tmp_path)
    assert (tmp_path / "model.onnx").is_file()
    for sizes in [(2, 5), (3, 9), (1, 7), (4, 1)]:
        with torch.no_grad():
            expected = model(**prompt(*sizes)).logits
        found = exported(**prompt(*sizes)).logits
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
