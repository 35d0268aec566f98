"""Versions of vLLM with which this plug-in was tested."""

from __future__ import annotations

TESTED = ("0.32",)
"""vLLM's interface for quantizations changes between its minor versions."""


class VersionError(RuntimeError):
    """A vLLM that was not tested."""


def check_version(version: str) -> None:
    """Raise `VersionError` unless a version of vLLM was tested.

    Example:
        >>> check_version("0.32.1+cpu")
        >>> check_version("0.33.0")
        Traceback (most recent call last):
        tnlm_vllm.versions.VersionError: vLLM 0.33.0 was not tested with this tnlm-vllm; ...
    """
    if ".".join(version.split(".")[:2]) not in TESTED:
        raise VersionError(
            f"vLLM {version} was not tested with this tnlm-vllm; tested: {', '.join(TESTED)}. "
            "Install one of these, or `pip install plugins/vllm` from a checkout of a tnlm that "
            "was tested with your vLLM"
        )
