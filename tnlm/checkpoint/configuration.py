"""Checks an untrusted config.json before transformers acts on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tnlm.checkpoint.json_file import shortened
from tnlm.checkpoint.transformers_plugin import GUARD, METHOD
from tnlm.errors import CheckpointError

MOST_COUNTED = 100_000
"""Most layers, labels or experts that a config may have, as configs make lists of them."""
COUNTED = ("layer", "label", "expert", "block", "depth", "stage", "codebook")


def check_config(config: Mapping[str, Any], trusted: bool) -> None:
    """Raise `CheckpointError` unless a config belongs to tnlm and stays in its directory.

    Args:
        config: the contents of ``config.json``.
        trusted: whether remote code may run.

    Example:
        >>> check_config({"quantization_config": {"quant_method": "gptq"}}, trusted=False)
        Traceback (most recent call last):
        tnlm.errors.CheckpointError: it was not written by tnlm; use AutoModel.from_pretrained
    """
    quantization_of(config)
    weights = config.get("transformers_weights")
    if weights not in (None, GUARD):
        raise CheckpointError(f"config.json names other weight files: {shortened(weights, 80)!r}")
    if "configuration_files" in config:
        raise CheckpointError("config.json names other configuration files")
    for key, value in _fields(config):
        counts = type(value) is int and any(word in key for word in COUNTED)
        if counts and abs(value) > MOST_COUNTED:
            raise CheckpointError(f"config.json has {key}={value}; allowed: up to {MOST_COUNTED}")
        if "implementation" in key and "/" in str(value) and not trusted:
            raise CheckpointError(
                f"config.json has {key}={shortened(value, 80)!r}, code from elsewhere; pass "
                "trust_remote_code=True to run it"
            )


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's description of the compression.

    Raises:
        CheckpointError: if it has none.

    Example:
        >>> quantization_of({"quantization_config": {"quant_method": "tnlm", "modules": {}}})
        {'quant_method': 'tnlm', 'modules': {}}
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError("it was not written by tnlm; use AutoModel.from_pretrained")
    return quantization


def _fields(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config and its nested configs, except those of tnlm."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "quantization_config":
            yield from _fields(value)
        else:
            yield key, value
