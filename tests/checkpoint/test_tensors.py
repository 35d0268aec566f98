"""No tensor is taken for what it is not, by tnlm.load and by transformers' classes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

import tnlm
from tnlm.checkpoint.tensors import check_finite, check_order
from tnlm.errors import CheckpointError

QUERY = "model.layers.0.self_attn.q_proj"
IDS = torch.arange(24).reshape(2, 12) % 61 + 3
WAYS = {"load": tnlm.load, "auto": AutoModelForCausalLM.from_pretrained}

way = pytest.mark.parametrize("read", WAYS.values(), ids=WAYS.keys())


def change(directory, name, value):
    """Put another tensor in a saved one's place, or none."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    found = next(n for n in tensors if name in n)
    new = value(tensors.pop(found))
    save_file({**tensors, **({} if new is None else {found: new})}, path, metadata={"format": "pt"})
    return found


def put(value):
    """Return what replaces one number of a tensor."""

    def replaced(tensor):
        tensor.view(-1)[1] = value
        return tensor

    return replaced


ORDERS = {
    "twice": lambda order: order.index_fill(0, torch.tensor([1]), int(order[0])),
    "too large": put(10**6),
    "negative": put(-1),
    "int32": lambda order: order.int(),
    "floats": lambda order: order.float(),
    "missing": lambda order: None,
}


@way
@pytest.mark.parametrize("broken", ORDERS.values(), ids=ORDERS.keys())
def test_an_order_names_every_row_once(broken, read, saved):
    name = change(saved, f"{QUERY}.right_order", broken)
    with pytest.raises(CheckpointError, match=name):
        read(saved)


DTYPES = ["int64", "bool", "complex64", "float8_e4m3fn", "uint8", "int8"]


@way
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tensor", [f"{QUERY}.left.weight", "model.norm.weight"])
def test_weights_are_floats(tensor, dtype, read, saved):
    change(saved, tensor, lambda values: values.to(getattr(torch, dtype)))
    with pytest.raises(
        CheckpointError, match=rf"{tensor} is stored as .*; allowed: F16, BF16, F32"
    ):
        read(saved)


@way
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_factors_of_one_module_have_one_dtype(dtype, read, saved):
    change(saved, f"{QUERY}.left.weight", lambda values: values.to(getattr(torch, dtype)))
    with pytest.raises(CheckpointError, match="stored as"):
        read(saved)


@way
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("kind", "scheme", "tensor"),
    [
        ("llama", "svd", f"{QUERY}.left.weight"),
        ("llama", "svd", "model.norm.weight"),
        ("llama", "modegpt", "mlp.up_proj.weight"),
        ("gpt2", "kron", "c_attn.q.left.weight"),
        ("gpt2", "svd", "h.1.mlp.c_fc.bias"),
        ("tied-llama", "albert", "embed_tokens.right"),
    ],
)
def test_values_are_finite(kind, scheme, tensor, value, read, compressed, tmp_path):
    directory = tnlm.save(compressed(kind, scheme), tmp_path / "model")
    name = change(directory, tensor, put(value))
    with pytest.raises(CheckpointError, match=f"{name} has values that are not finite"):
        read(directory)


@way
@pytest.mark.parametrize("tensor", [f"{QUERY}.left.weight", "model.norm.weight"])
def test_what_a_file_lacks_is_an_error(tensor, read, saved):
    change(saved, tensor, lambda values: None)
    with pytest.raises(CheckpointError, match=f"missing keys: {tensor}"):
        read(saved)


@pytest.mark.parametrize("tensor", [f"{QUERY}.left.weight", f"{QUERY}.right_order"])
def test_a_body_needs_its_factors_too(tensor, saved):
    change(saved, tensor, lambda values: None)
    with pytest.raises(CheckpointError, match=r"missing keys: layers\.0\.self_attn\.q_proj"):
        AutoModel.from_pretrained(saved)


def test_a_module_that_the_config_forgets_is_an_error(saved):
    config = json.loads((saved / "config.json").read_text())
    del config["quantization_config"]["modules"][QUERY]
    (saved / "config.json").write_text(json.dumps(config))
    for read in (tnlm.load, AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained):
        with pytest.raises(CheckpointError, match=r"missing keys: .*q_proj\.weight"):
            read(saved)


def test_two_names_of_one_tensor_are_an_error(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"] = torch.ones(32)
    save_file(tensors, path, metadata={"format": "pt"})
    for read in WAYS.values():
        with pytest.raises(CheckpointError, match=r"two tensors for model\.norm\.weight"):
            read(saved)


def test_a_dtype_that_was_asked_for_is_no_fault(compressed, tmp_path):
    model = compressed("llama", "svd").bfloat16()
    directory = tnlm.save(model, tmp_path / "model")
    for read in WAYS.values():
        loaded = read(directory, dtype="float32")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight.float())


def test_a_file_in_fewer_digits_than_its_config_says_is_no_such_model(saved):
    path = saved / "model.safetensors"
    tensors = load_file(path)
    halves = {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(halves, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"config\.json has dtype 'float32', but no tensor"):
        tnlm.load(saved)
    assert tnlm.load(saved, dtype="float16").dtype == torch.float16


@way
def test_a_dtype_that_cannot_hold_the_values_is_an_error(read, saved):
    change(saved, f"{QUERY}.left.weight", put(1e6))
    with pytest.raises(CheckpointError, match=r"not finite in torch\.float16"):
        read(saved, dtype="float16")


@pytest.mark.filterwarnings("ignore:.*:UserWarning:accelerate")
@pytest.mark.parametrize("broken", ["nan", "order"])
def test_tensors_on_disk_are_looked_at_too(broken, saved, tmp_path):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "lm_head": "cpu"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu"}
    offload = {"device_map": places, "offload_folder": tmp_path / "offload"}
    assert any(p.is_meta for p in tnlm.load(saved, **offload).parameters())
    if broken == "nan":
        name = change(saved, f"{QUERY}.left.weight", put(float("nan")))
    else:
        name = change(saved, f"{QUERY}.right_order", put(10**6))
    with pytest.raises(CheckpointError, match=name):
        tnlm.load(saved, **offload)


def test_a_new_head_starts_sound(compressed, tmp_path):
    model = compressed("masked-bert", "svd", targets=r".*(query|transform\.dense)")
    body = AutoModel.from_pretrained(tnlm.save(model, tmp_path / "whole"))
    body.save_pretrained(tmp_path / "body")
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "body")
    assert isinstance(loaded, BertForMaskedLM)
    head = loaded.cls.predictions.transform.dense
    check_order("order", head.right_order)
    assert all(bool(p.isfinite().all()) for p in head.parameters())
    assert bool(loaded(IDS).logits.isfinite().all())


def test_a_table_out_of_proportion_is_not_made(saved):
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"vocab_size": 10**9}))
    for read in WAYS.values():
        with pytest.raises(CheckpointError, match="asks for 64,000,000,000 parameters"):
            read(saved)


def test_pickled_weights_are_not_read_by_transformers_either(saved):
    torch.save({}, saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_is_finite_in_every_dtype(dtype):
    check_finite("w", torch.zeros(0, dtype=dtype))
    check_finite("w", torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(CheckpointError, match="w has"):
            check_finite("w", torch.tensor([0.0, value, 1.0], dtype=dtype))


@pytest.mark.parametrize(
    "order",
    [
        torch.zeros(2),
        torch.tensor([1]),
        torch.tensor([[0, 1], [1, 1]]),  # a row for each expert
        torch.zeros(1, 1, 1).long(),
    ],
)
def test_an_order_is_a_permutation(order):
    check_order("o", torch.tensor([2, 0, 1]))
    check_order("o", torch.zeros(0, dtype=torch.int64))
    with pytest.raises(CheckpointError, match=r"^o(\[1\])? "):
        check_order("o", order)


@pytest.mark.slow
@pytest.mark.parametrize("module", ["tensors", "loading", "configuration", "describing"])
def test_every_module_may_be_imported_first(module):
    command = [sys.executable, "-c", f"import tnlm.checkpoint.{module}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_class_that_finds_none_of_its_tensors_is_refused(tmp_path):
    """Dense files of this family are renamed as they are read; this class would be random."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = CLIPTextConfig(vocab_size=64, num_hidden_layers=1, projection_dim=16, **sizes)
    model = tnlm.compress(CLIPTextModelWithProjection(config), "svd", keep_targets=0.7)
    directory = tnlm.save(model, tmp_path / "model")
    with pytest.raises(CheckpointError, match="load the CLIPTextModelWithProjection that was"):
        CLIPTextModel.from_pretrained(directory)
    tnlm.load(directory)
