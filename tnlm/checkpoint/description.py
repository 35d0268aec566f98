"""The description of a compressed model in `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from tnlm.checkpoint.configs import GUARD as GUARD
from tnlm.checkpoint.configs import METHOD as METHOD
from tnlm.checkpoint.entries import Entry
from tnlm.errors import CheckpointError

FORMAT_VERSION = 3
"""Version of the files written; since version 3, tensors have the same names as in the model."""


READABLE = (2, 3)


@register_quantization_config(METHOD)
class TnlmConfig(QuantizationConfigMixin):
    """The description of a compressed model in ``config.json``.

    Args:
        modules: entry of each compressed module, by name (see `tnlm.checkpoint.entries`).
        tied: tied parameters: each name with the name it shares.
        scheme: name of the scheme.
        options: the request, for the record.
        format_version: version of this layout.
    """

    def __init__(
        self,
        modules: Mapping[str, Entry] | None = None,
        tied: Mapping[str, str] | None = None,
        scheme: str | None = None,
        options: Mapping[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        **kwargs: Any,
    ) -> None:
        """Store the fields; unknown ones of a later version are ignored."""
        self.quant_method = METHOD  # type: ignore[assignment]  # not in transformers' enum
        self.format_version = format_version
        self.scheme = scheme
        self.options = _checked("options", options)
        self.modules = _checked("modules", modules)
        self.tied = _checked("tied", tied, str)


def _checked(name: str, value: Any, kind: type = object) -> dict[str, Any]:
    """Return a field as a dict; raise `CheckpointError` if it is not one."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, kind) for v in value.values()):
        raise CheckpointError(f"config.json has a broken field {name!r}: {str(value)[:60]}")
    return dict(value)
