"""A hash of a model's config and weights."""

from __future__ import annotations

import hashlib
import json

import torch
from transformers import PreTrainedModel

from tnlm.utils.residency import offloaded

_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""Config fields about a model's origin, not its computation."""


def model_hash(model: PreTrainedModel) -> str:
    """Return a hash of a model's config and weights, or of its files if weights are on disk.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1))
        >>> before = model_hash(tiny)
        >>> _ = torch.nn.init.zeros_(tiny.transformer.ln_f.weight)
        >>> model_hash(tiny) == before
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _ABOUT_FILES}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = offloaded(model)
    if weights is not None:
        digest.update(weights.identity.encode())
        return digest.hexdigest()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
