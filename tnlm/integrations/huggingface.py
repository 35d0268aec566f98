"""The quantizer plug-in through which transformers saves and loads compressed models.

This is the only file that touches that interface: transformers asks the quantizer to prepare the
skeleton of the model before the weights are read, and writes its config beside the weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from tnlm.checkpoint.tensors import Arrivals
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.arranged import arrange_made
from tnlm.layers.build import Entry, build, check_entry, dense_module
from tnlm.planning import FORMAT_VERSION

METHOD = "tnlm"
GUARD = "IMPORT_TNLM_BEFORE_LOADING.safetensors"
"""A file name that no directory has: transformers alone stops there, the plug-in clears it."""


@register_quantization_config(METHOD)
class TnlmConfig(QuantizationConfigMixin):
    """What ``config.json`` says about a compressed model.

    Args:
        modules: module name to entry (see `tnlm.layers.build`).
        tied: parameter name to the name of the parameter it shares.
        scheme: name of the scheme.
        options: the request, for the record.
        format_version: of this layout.
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
        """Keep the fields; unknown ones of a later version are ignored."""
        self.quant_method = METHOD  # type: ignore[assignment]  # their enum lists only their own
        self.format_version = format_version
        self.scheme = scheme
        self.options = _checked("options", options)
        self.modules = _checked("modules", modules)
        self.tied = _checked("tied", tied, str)


def _checked(name: str, value: Any, kind: type = object) -> dict[str, Any]:
    """Return a field as a dict, or say that a file holds something else there."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, kind) for v in value.values()):
        raise CheckpointError(f"config.json has a broken field {name!r}: {str(value)[:60]}")
    return dict(value)


@register_quantizer(METHOD)
class TnlmQuantizer(HfQuantizer):
    """Builds the factorized modules before weights are read, and turns them back on request."""

    requires_calibration = True  # refuses to compress on the fly: that is tnlm.compress
    quantization_config: TnlmConfig
    arrivals: Arrivals | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse files of a later layout."""
        version = self.quantization_config.format_version
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format_version {version!r}; this tnlm reads {FORMAT_VERSION}: "
                "load it with the tnlm that wrote it, or compress again with this one"
            )

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Clear the guard; the first hook that sees the config before files are looked for."""
        if getattr(config, "transformers_weights", None) == GUARD:
            config.transformers_weights = None
        return config

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Drop rules for modules that no longer exist; their factors stay whole on every rank."""
        for name in self.quantization_config.modules:
            plan.pop(_with_wildcards(name), None)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        place(model, self.quantization_config)
        self.arrivals = Arrivals(model, self.quantization_config.modules, checkpoint_files)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Note what is about to be read; the dtype stays transformers' choice."""
        if self.arrivals is not None:
            self.arrivals.note(converter, param)
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.arrivals is not None:
            self.arrivals.check(model)
            self.arrivals = None
        arrange_made(model)  # files hold every weight by rows
        # .half() and .float() stay allowed.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                "weights of the model are offloaded, and cannot be put together; load it without "
                "device_map, or with one that keeps all in memory"
            )
        added = [n for n, e in self.quantization_config.modules.items() if e.get("bias_added")]
        if added:
            raise ModelError(
                f"{type(model).__name__} has no place for the bias that was added to {added[0]} "
                f"and {len(added) - 1} others; a dense copy would not load as what it is. Keep the "
                "model compressed, or compress with a metric that adds no bias, such as 'input'"
            )
        for name, entry in self.quantization_config.modules.items():
            if not _has(model, name):
                continue  # a head that this class of model lacks
            module = model.get_submodule(name)
            model.set_submodule(name, dense_module(entry, module).train(module.training))
        for name in ("all_tied_weights_keys", "_tied_weights_keys"):
            vars(model).pop(name, None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return True: the factors are ordinary tensors."""
        return True

    is_trainable = is_qat_trainable = is_compileable = property(lambda self: True)


def place(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Put the modules that a config describes into a model, uninitialised.

    Each is made on the device and in the dtype of the dense weight that it replaces.

    Raises:
        CheckpointError: if the config does not fit the model.
    """
    names = {name: _resolve(model, name) for name in config.modules}
    found = {name: entry for name, entry in config.modules.items() if names[name] is not None}
    for name, entry in found.items():
        check_entry(name, entry, model.get_submodule(names[name] or ""))
    for name, entry in found.items():
        old: Any = model.get_submodule(names[name] or "").weight
        made = build(entry, device=old.device, dtype=old.dtype)
        model.set_submodule(names[name] or "", made)
    tied = {
        _rename(names, target): _rename(names, source)
        for target, source in config.tied.items()
        if _owners(config, target, source) <= found.keys()
    }
    _check_ties(model, tied)
    retie(model, tied)
    # Names of this class of model, so that saving it again writes what it holds. Heads that it
    # lacks stay listed: a body saved alone may be loaded under its head again.
    config.tied = {_rename(names, a): _rename(names, b) for a, b in config.tied.items()}
    config.modules = {names[name] or name: entry for name, entry in config.modules.items()}


def attach(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Make a compressed model save, load and dequantize through transformers."""
    model.config.quantization_config = config
    model.hf_quantizer = TnlmQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.quantization_method = METHOD  # type: ignore[assignment]
    retie(model, config.tied)


def retie(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Tell transformers which parameters are shared, now that names have changed.

    Both attributes count: one is used at load, the other when saving drops duplicates.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    old = model.all_tied_weights_keys.items()
    kept = {target: source for target, source in old if {target, source} <= names}
    model.all_tied_weights_keys = {**kept, **tied}
    model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _owner(modules: Collection[str], parameter: str) -> str | None:
    """Return the module, among several, that holds a parameter, itself or in a child."""
    parts = parameter.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if ".".join(parts[:end]) in modules:
            return ".".join(parts[:end])
    return None


def _owners(config: TnlmConfig, *parameters: str) -> set[str]:
    """Return the compressed modules that hold parameters."""
    owners = {_owner(config.modules, name) for name in parameters}
    if None in owners:
        raise CheckpointError(f"config.json ties {' to '.join(parameters)}, of no module it names")
    return {owner for owner in owners if owner is not None}


def _check_ties(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for target, source in tied.items():
        if target not in shapes or shapes[target] != shapes.get(source):
            raise CheckpointError(
                f"config.json ties {target} to {source}: not two parameters of one shape"
            )


def _resolve(model: PreTrainedModel, name: str) -> str | None:
    """Return a saved module's name in this class of model; None for a task head it does not have.

    A body (``LlamaModel``) lacks the prefix that a model with a head (``LlamaForCausalLM``) has.

    Raises:
        CheckpointError: if the body has no such module.
    """
    prefix = f"{model.base_model_prefix}."
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if _has(model, candidate):
            return candidate
    is_body = model.base_model is model
    if (is_body and not name.startswith(prefix)) or (not is_body and _is_head(model, name, prefix)):
        return None
    raise CheckpointError(
        f"config.json names a module {name!r} that {type(model).__name__} does not have"
    )


def _is_head(model: PreTrainedModel, name: str, prefix: str) -> bool:
    """Tell whether a name that this model lacks lies outside the body."""
    first = name.split(".")[0]
    return not name.startswith(prefix) and not hasattr(model.base_model, first)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _rename(names: Mapping[str, str | None], parameter: str) -> str:
    """Return a parameter's name under the new name of its module."""
    module = _owner(names, parameter) or parameter.rpartition(".")[0]
    return f"{names.get(module) or module}{parameter.removeprefix(module)}"


def _with_wildcards(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
