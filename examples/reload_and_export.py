"""Save, load, export
==================

A compressed model is a directory like any other: safetensors and a config. It loads where tnlm is
imported; turned back into dense weights, or exported, it needs no tnlm. On your own model::

    python examples/reload_and_export.py --model MODEL --text TEXT
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.exporters import DynamoConfig, OnnxConfig
from transformers.exporters.exporter_dynamo import DynamoExporter
from transformers.exporters.exporter_onnx import OnnxExporter

import tnlm

given = tiny.setting(__doc__)
place = tempfile.TemporaryDirectory()
folder = Path(place.name)
model = tnlm.compress(given.model, "svd", keep_targets=0.8, progress=False).eval()
prompt = dict(given.tokenizer(["The value of"], return_tensors="pt"))
prompt = {name: prompt[name] for name in ("input_ids", "attention_mask")}
with torch.no_grad():
    logits = model(**prompt).logits


def differ(other: torch.Tensor) -> float:
    """Return the largest difference from the compressed model's logits."""
    return float((other.detach() - logits).abs().max())


# %%
# ``tnlm.save`` writes all or nothing, with the tokenizer and the report beside the weights. After
# ``import tnlm`` transformers reads the directory by itself.

tnlm.save(model, folder / "small", tokenizer=given.tokenizer)
print(sorted(file.name for file in (folder / "small").iterdir()))
loaded = AutoModelForCausalLM.from_pretrained(folder / "small")
tokenizer = AutoTokenizer.from_pretrained(folder / "small")
print(f"loaded: logits differ by {differ(loaded(**prompt).logits):.1e}")
print(f"loaded: perplexity {given.perplexity(loaded):.2f}")

# %%
# ``to_dense`` multiplies the factors out. The model is as large as before, and any tool reads it.

dense = tnlm.to_dense(copy.deepcopy(loaded))
dense.save_pretrained(folder / "dense")
print(f"dense:  logits differ by {differ(dense(**prompt).logits):.1e}")

# %%
# The exported program holds operations of torch alone, for any batch size and length.

two = {name: value.repeat(2, 1) for name, value in prompt.items()}
exported = DynamoExporter().export(loaded, two, config=DynamoConfig(dynamic=True))
exported.save_pretrained(folder / "exported")
print("exported:", *sorted(file.name for file in (folder / "exported").iterdir()))

# %%
# To ONNX, where its packages are installed: ``pip install onnx onnxscript onnxruntime``.

if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
    program = OnnxExporter().export(loaded, two, config=OnnxConfig(dynamic=True))
    program.save_pretrained(folder / "onnx")
    print(f"onnx:   logits differ by {differ(program(**two).logits[:1]):.1e}")
else:
    print("onnx:   not installed")

# %%
# A dense directory is served by transformers alone::
#
#     transformers serve dense
#
# and the small one by any program that imports tnlm before it loads the model. The parameters that
# each of its blocks keeps:

given.show(tnlm.plot.allocation, tnlm.report(model))

place.cleanup()
