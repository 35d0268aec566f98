"""vLLM: a checkpoint whose factored layers tnlm's plug-in for vLLM runs as they are."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.checkpoint.configs import METHOD, is_ours
from tnlm.checkpoint.entries import Entry
from tnlm.checkpoint.savable import check_savable
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.errors import ModelError
from tnlm.runtimes.base import Prepared, Runtime
from tnlm.runtimes.gguf_layout import FAMILIES as IN_GGUF
from tnlm.runtimes.gguf_layout import head_size
from tnlm.runtimes.plain import skeleton
from tnlm.runtimes.vllm_layers import chain_of
from tnlm.runtimes.weights import generation_config, plain_weights

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Kinds of models that were run in vLLM with factored layers."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Layers of these models that may be compressed."""
KINDS = ("linear", "dense", "sliced", "narrowed")
"""Kinds of checkpoint entries that are run."""
LAYOUT = 1
"""Version of the description; the plug-in reads one."""
GUARD = "SERVE_WITH_VLLM.safetensors"
"""The name of no file: transformers, which cannot run these factors, fails to find it."""


def _prepare(model: PreTrainedModel, tokenizer: Any, _: str) -> Prepared:
    said = config_of(model)
    entries: Mapping[str, Entry] = {} if said is None else said.modules
    _check(model, entries)
    if said is not None:
        check_savable(model, said)
    generation = generation_config(model)
    layers: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name in entries:
        made = chain_of(name, model.get_submodule(name))
        if made is not None:
            layers[name] = made[0]
            tensors |= {f"{name}.{part}": tensor for part, tensor in made[1].items()}
    plain = plain_weights(model, leave=layers)
    config = _config(model, plain, layers)
    if model.config.tie_word_embeddings:
        plain.pop("lm_head.weight", None)
    weights = _apart({name: tensor.cpu() for name, tensor in (plain | tensors).items()})

    def write(directory: Path) -> None:
        config.save_pretrained(directory)
        if layers:
            _guard(directory / "config.json")
        if generation is not None:
            generation.save_pretrained(directory)
        save_torch_state_dict(weights, directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

    return Prepared(sum(t.numel() * t.element_size() for t in weights.values()), write)


def _check(model: PreTrainedModel, entries: Mapping[str, Entry]) -> None:
    """Raise `ModelError` for a model, or a compressed layer, that is not run."""
    kind = model.config.model_type
    if kind not in FAMILIES or not type(model).__name__.endswith("ForCausalLM"):
        raise ModelError(
            f"a {kind} ({type(model).__name__}) was not run in vLLM with factors; allowed: causal "
            f"models of {', '.join(FAMILIES)}"
        )
    if model.config.hidden_act != "silu":
        raise ModelError(
            f"hidden_act={model.config.hidden_act!r}; vLLM runs models of {kind} with silu"
        )
    other = getattr(model.config, "quantization_config", None)
    if other is not None and not is_ours(other):
        raise ModelError(
            "the model is quantized by another library as well, and config.json has one "
            "quantization_config; export it unquantized"
        )
    for name, entry in entries.items():
        form = entry.get("format", entry["kind"])
        if name.rpartition(".")[2] not in PROJECTIONS:
            raise ModelError(
                f"{name} is compressed ({form}), and tnlm-vllm runs only "
                f"{', '.join(PROJECTIONS)}; leave it dense with ignore=",
                argument="ignore",
            )
        if entry["kind"] not in KINDS:
            raise ModelError(
                f"{name} is compressed ({form}), which tnlm-vllm does not run; compress with "
                "another format, or make the model dense with tnlm.to_dense"
            )


def _config(model: PreTrainedModel, plain: Mapping[str, Tensor], layers: Mapping[str, Any]) -> Any:
    """Return the config to write: of the model's widths, with a description of the layers."""
    shapes = {f"{name}.weight": said["shape"] for name, said in layers.items()}
    whole = {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
    _check_heads(model.config, {**plain, **whole})
    made = copy.deepcopy(
        skeleton(
            model,
            {**plain, **whole},
            "vLLM's class has one width for all blocks. Export it with to='decilm', which has a "
            "width for each, or compress with formats that leave widths as they are",
        ).config
    )
    made.architectures = [type(model).__name__]
    made.dtype = str(model.dtype).removeprefix("torch.")
    if layers:
        made.quantization_config = {
            "quant_method": METHOD,
            "runtime": "vllm",
            "layout": LAYOUT,
            "layers": dict(layers),
        }
    return made


def _check_heads(config: Any, weights: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` if attention lost heads."""
    size = head_size(config)
    heads = {"q": config.num_attention_heads} | dict.fromkeys("kv", config.num_key_value_heads)
    for name, tensor in weights.items():
        part = name.split(".")[-2][:1] if name.endswith("_proj.weight") else ""
        if ".self_attn." in name and part in heads and len(tensor) != heads[part] * size:
            raise ModelError(
                f"{name} has {len(tensor) // size} heads of {heads[part]}, and vLLM's class has "
                "all in all blocks. Export it with to='gguf' "
                f"({', '.join(IN_GGUF)}), where blocks differ in heads, or compress "
                "with formats other than 'heads'",
                argument="to",
            )


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors that share no memory: of those that do, files hold only one."""
    seen: set[int] = set()
    made = {}
    for name, tensor in weights.items():
        place = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return made


def _guard(file: Path) -> None:
    """Name weights that are not there, which transformers looks for and vLLM does not."""
    said = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(said | {"transformers_weights": GUARD}, indent=2) + "\n")


RUNTIME = Runtime(
    name="vllm",
    title="a checkpoint whose factored layers tnlm-vllm, a plug-in, runs in vLLM",
    to="vllm",
    types=("model",),
    formats=(
        "low-rank",
        "kronecker",
        "tucker",
        "tensor-train",
        "tensor-ring",
        "block-train",
    ),
    multiple=1,
    prepare=_prepare,
)
