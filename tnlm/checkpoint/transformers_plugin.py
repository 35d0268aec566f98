"""The quantizer plug-in through which transformers loads compressed models.

Only this file uses that interface: transformers asks the quantizer to prepare the skeleton of the
model before the weights are read. For writing, see `tnlm.checkpoint.writing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from tnlm.checkpoint.configs import GUARD as GUARD
from tnlm.checkpoint.configs import METHOD as METHOD
from tnlm.checkpoint.configs import clear_guard, own_config
from tnlm.checkpoint.description import FORMAT_VERSION, READABLE, TnlmConfig
from tnlm.checkpoint.entries import before_dense, build, check_entry, dense_module, link
from tnlm.checkpoint.naming import has, names_in, owner_of, rename, rename_in, with_wildcards
from tnlm.checkpoint.parts import PART, around, describe_parts, submodels
from tnlm.checkpoint.reports import add_report
from tnlm.checkpoint.tensors import Arrivals
from tnlm.checkpoint.vocabulary import install, uninstall
from tnlm.errors import CheckpointError, ModelError
from tnlm.layers.arranged import arrange_made


@register_quantizer(METHOD)
class TnlmQuantizer(HfQuantizer):
    """Builds the factorized modules before weights are read, and makes them dense on request."""

    requires_calibration = True  # rejects compression on the fly, which tnlm.compress does
    quantization_config: TnlmConfig
    arrivals: Arrivals | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise `CheckpointError` for files of an unknown format version."""
        version = self.quantization_config.format_version
        if version not in READABLE:
            readable = " and ".join(map(str, READABLE))
            raise CheckpointError(
                f"the checkpoint has format_version {version!r}; this tnlm reads {readable}: "
                "load it with the tnlm that wrote it, or compress again with this one"
            )

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Clear the guard; this is the first hook with the config before files are located."""
        clear_guard(config)
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Drop transformers' conversions for dense files, but keep the user's own."""
        if self.quantization_config.format_version == 2:
            return weight_conversions
        given = len(weight_conversions) - len(get_model_conversion_mapping(model))
        return weight_conversions[:given]

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Drop rules for modules that no longer exist; their factors stay whole on every rank."""
        for name in self.quantization_config.modules:
            plan.pop(with_wildcards(name), None)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        place(model, self.quantization_config)
        self.arrivals = Arrivals(model, self.quantization_config.modules, checkpoint_files)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """Record the tensor about to be read, and leave its dtype to transformers."""
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
        self.quantization_config.format_version = FORMAT_VERSION  # for files written from now on
        vars(model).pop("_weight_conversions", None)  # they belong to this file
        describe_parts(model, self.quantization_config)
        install(model)
        add_report(model, model.name_or_path)
        # .half() and .float() stay allowed, and the model computes as it did before it was saved.
        model.is_quantized = False  # type: ignore[assignment]
        for _, part in (("", model), *submodels(model)):
            vars(part.config).pop("_is_quantized", None)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ModelError(
                "weights of the model are offloaded, so it cannot be made dense; load it without "
                "device_map, or with one that keeps all weights in memory"
            )
        added = [
            name
            for name, entry in self.quantization_config.modules.items()
            if any(part.get("bias_added") for part in entry.get("parts", [entry]))
        ]
        if added:
            raise ModelError(
                f"{type(model).__name__} has no place for the bias that was added to {added[0]} "
                f"and {len(added) - 1} others, so a dense copy could not be loaded again. Keep the "
                "model compressed, or compress with a metric that adds no bias, such as 'input'"
            )
        modules = self.quantization_config.modules
        before_dense(model, {name: entry for name, entry in modules.items() if has(model, name)})
        uninstall(model)
        for name, entry in self.quantization_config.modules.items():
            if not has(model, name):
                continue  # a head that this class of model lacks
            module = model.get_submodule(name)
            model.set_submodule(name, dense_module(entry, module).train(module.training))
        for name in ("all_tied_weights_keys", "_tied_weights_keys"):
            vars(model).pop(name, None)
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        model.tie_weights()
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove the description and the report, but keep conversions for dense files."""
        vars(model).pop("tnlm_report", None)
        conversions = vars(model).get("_weight_conversions")
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        if conversions is not None:
            model._weight_conversions = conversions
        for _, part in submodels(model):
            vars(part).pop(PART, None)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Return True: the factors are ordinary tensors."""
        return True

    is_trainable = is_qat_trainable = is_compileable = property(lambda self: True)


def place(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Put the modules that a config describes into a model, uninitialised.

    Each gets the device and dtype of the dense weight that it replaces.

    Raises:
        CheckpointError: if the config does not fit the model.
    """
    names = names_in(model, config)
    found = {name: entry for name, entry in config.modules.items() if names[name] is not None}
    for name, entry in found.items():
        check_entry(name, entry, model.get_submodule(names[name] or ""))
    for name, entry in found.items():
        old = model.get_submodule(names[name] or "")
        like = next(old.parameters())
        made = build(entry, device=like.device, dtype=like.dtype, old=old)
        model.set_submodule(names[name] or "", made)
    for name, entry in found.items():
        link(model, entry, model.get_submodule(names[name] or ""))
    tied = {
        rename(names, target): rename(names, source)
        for target, source in config.tied.items()
        if _owners(config, target, source) <= found.keys()
    }
    _check_ties(model, tied)
    retie(model, tied)
    rename_in(config, names)  # saving it again then writes its own names


def attach(model: PreTrainedModel, config: TnlmConfig) -> None:
    """Make a compressed model save, load and dequantize through transformers."""
    own_config(model).quantization_config = config
    model.hf_quantizer = TnlmQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.quantization_method = METHOD  # type: ignore[assignment]
    install(model)
    retie(model, config.tied)
    describe_parts(model, config)


def config_of(model: nn.Module) -> TnlmConfig | None:
    """Return the description of a compressed model, or None for any other.

    A dense model built from the config of a compressed one has none.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if isinstance(quantizer, TnlmQuantizer) else None


def description(model: PreTrainedModel) -> TnlmConfig | None:
    """Return the description for `config.json` of a model, a part, or a model with such parts."""
    own: TnlmConfig | None = config_of(model) or vars(model).get(PART)
    if own is not None:
        return own
    inner = {name: config_of(part) for name, part in submodels(model)}
    return around({name: config for name, config in inner.items() if config is not None})


def retie(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    """Update the tied parameters that transformers knows, after names have changed.

    Loading uses one of the two attributes, saving the other, to drop duplicates.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    old = model.all_tied_weights_keys.items()
    kept = {target: source for target, source in old if {target, source} <= names}
    model.all_tied_weights_keys = {**kept, **tied}
    model._tied_weights_keys = dict(model.all_tied_weights_keys)


def _owners(config: TnlmConfig, *parameters: str) -> set[str]:
    """Return the compressed modules that hold parameters."""
    owners = {owner_of(config.modules, name) for name in parameters}
    if None in owners:
        raise CheckpointError(
            f"config.json ties {' to '.join(parameters)}, which are not in modules it names"
        )
    return {owner for owner in owners if owner is not None}


def _check_ties(model: PreTrainedModel, tied: Mapping[str, str]) -> None:
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    for target, source in tied.items():
        if target not in shapes or shapes[target] != shapes.get(source):
            raise CheckpointError(
                f"config.json ties {target} to {source}, which are not parameters of one shape"
            )
