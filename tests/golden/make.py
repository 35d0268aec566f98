"""Makes the golden checkpoints of this version's layout: ``python tests/golden/make.py``.

Once committed, a checkpoint stays as it is: it shows that files of the version that wrote it are
still read. Run this after `FORMAT_VERSION` went up; it writes what is missing, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

import tnlm
from tnlm.checkpoint.description import FORMAT_VERSION

HERE = Path(__file__).parent
IDS = torch.arange(6).reshape(1, 6) + 3
TEXT = {"calibration": torch.arange(192) % 21 + 3, "max_length": 16, "num_samples": 8}
SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": False,
    "eos_token_id": None,
}


def make(name: str, kind: str = "ForCausalLM", **config: Any) -> PreTrainedModel:
    """Return a model with seeded weights."""
    torch.manual_seed(0)
    configured = getattr(transformers, f"{name}Config")(**config)
    model: PreTrainedModel = getattr(transformers, f"{name}{kind}")(configured).eval()
    return model


def llama(**config: Any) -> PreTrainedModel:
    return make("Llama", **(SIZES | config))


def gpt2(**config: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 24, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}
    return make("GPT2", kind="LMHeadModel", eos_token_id=None, bos_token_id=None, **sizes, **config)


def bert() -> PreTrainedModel:
    return make("Bert", kind="Model", **SIZES, type_vocab_size=1)


def mixtral() -> PreTrainedModel:
    return make("Mixtral", **SIZES, num_local_experts=2, num_experts_per_tok=1)


def gpt_oss() -> PreTrainedModel:
    return make("GptOss", **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)


def nomic() -> PreTrainedModel:
    return make("NomicBert", kind="Model", **SIZES, type_vocab_size=1)


def llava() -> PreTrainedModel:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return make(
        "Llava",
        kind="ForConditionalGeneration",
        text_config={"model_type": "llama", **SIZES},
        vision_config={"model_type": "clip_vision_model", **vision},
        image_token_index=1,
        vision_feature_layer=-1,
    )


def half_simple() -> PreTrainedModel:
    """Return a GPT-2 whose queries are of rank 1, so that some parts shrink and others do not."""
    model: Any = gpt2()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :16] = 0.01
    return model


def in_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    return model


CASES: dict[str, tuple[Callable[[], PreTrainedModel], str, dict[str, Any]]] = {
    "low-rank": (llama, "svd", {}),
    "bfloat16": (lambda: in_bfloat16(llama()), "svd", {}),
    "kronecker": (llama, "kron", {}),
    "tensor-train": (llama, "tt", {}),
    "tensor-ring": (llama, "tr", {}),
    "tucker": (llama, "tucker", {}),
    "cp": (llama, "cp", {}),
    "block-train": (llama, "btt", {}),
    "channels": (llama, "modegpt", TEXT),
    "channel-ranks": (
        llama,
        tnlm.scheme("auto", formats=("channel-ranks",), allocation="uniform"),
        {"targets": r".*mlp.*", "width": 16, "ranks": (5, 12, 7), **TEXT},
    ),
    "heads": (
        lambda: llama(num_key_value_heads=2),
        tnlm.scheme("modegpt", formats=("heads",)),
        {"targets": r".*self_attn.*", "keep_targets": 0.7, **TEXT},
    ),
    "submatrix": (llama, "llm-surgeon", {"keep_targets": 0.6, "shots": 2, **TEXT}),
    "added-bias": (llama, "afm", TEXT),
    "shared-factors": (lambda: llama(num_hidden_layers=2), "basis-sharing", TEXT),
    "stacks": (
        lambda: llama(num_hidden_layers=2),
        "stack-tucker",
        {"metric": "identity", "allocation": "uniform", "keep_targets": 0.6},
    ),
    "tied-table": (lambda: llama(tie_word_embeddings=True), "albert", {}),
    "token-mps": (lambda: llama(tie_word_embeddings=True), "tensorgpt", {}),
    "kronecker-rows": (gpt2, "shapeshifter", {"keep_targets": 0.5}),
    "fused": (gpt2, "svd", {}),
    "part-dense": (half_simple, "svd", {"tolerance": 1e-3, "targets": ["c_attn"]}),
    "body": (bert, "svd", {}),
    "experts": (mixtral, "svd", {"ignore": ["experts"]}),
    "stacked-experts": (gpt_oss, "svd", {}),
    "kronecker-experts": (mixtral, "kron", {}),
    "sliced-experts": (
        gpt_oss,
        tnlm.scheme("stack-tucker", formats=("expert-tucker",), metric="identity"),
        {"targets": ["experts"], "allocation": "uniform", "keep_targets": 0.6},
    ),
    "dropped-experts": (mixtral, "reap", {"keep_targets": 0.5, **TEXT}),
    "renamed": (nomic, "svd", {}),
    "prefixed": (llava, "svd", {}),
    "shards": (llama, "svd", {}),
    "packed": (
        lambda: llama(tie_word_embeddings=True),
        "rtn",
        {"precision": "int4", "symmetric": False, "targets": ["all-linear", "embeddings"]},
    ),
    "packed-factors": (llama, "svd", {"precision": "int3", "group": 8}),
    "packed-parts": (gpt2, "rtn", {}),
}


def digest(model: PreTrainedModel) -> str:
    """Return one SHA-256 sum of every tensor of a model, names, types and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Return logits, or hidden states of a body."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS)[0]
    return found


def write(name: str, directory: Path) -> None:
    """Compress one model, and write its checkpoint and what it must be read as."""
    maker, scheme, options = CASES[name]
    model = tnlm.compress(maker(), scheme, progress=False, **options)
    tnlm.save(model, directory, max_shard_size="4KB" if name == "shards" else "1GB")
    (directory / "tnlm_report.json").unlink()  # times and versions, of no interest here
    expected = {"sha256": digest(model), "outputs": outputs(model).tolist()}
    (directory / "expected.json").write_text(json.dumps(expected) + "\n")


if __name__ == "__main__":
    for case in CASES:
        place = HERE / f"v{FORMAT_VERSION}-{case}"
        if not place.exists():
            write(case, place)
