"""from_config: a factorized model with random weights, to be trained from scratch."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tnlm.checkpoint.description import TnlmConfig
from tnlm.checkpoint.transformers_plugin import attach, place
from tnlm.compression.evidence import Evidence
from tnlm.compression.fitting import by_module
from tnlm.compression.initial import allocate, draw, initialize
from tnlm.compression.job import Job
from tnlm.compression.pipeline import settle
from tnlm.compression.request import Request, make_request
from tnlm.decompositions import get_format
from tnlm.errors import ModelError, OptionError
from tnlm.plans.plan import Plan
from tnlm.plans.report import Report
from tnlm.schemes import get_scheme, schemes
from tnlm.targets.base import Member, Selector
from tnlm.targets.selection import select


def from_config(
    config: PreTrainedConfig,
    scheme: str,
    *,
    model_class: Any = None,
    targets: Selector | None = None,
    ignore: Selector | None = None,
    keep: float | None = None,
    keep_targets: float | None = None,
    max_macs: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Make a model whose chosen matrices are factorized, with random weights.

    Nothing is fitted, and the matrices that are replaced are not made, but for one linear layer of
    each kind and some rows of an embedding, for a moment: they show how the architecture itself
    initialises, and a product of factors has the same standard deviation, see
    :func:`tnlm.tensors.gaussian.gaussian`. Biases are 0; everything else is initialised as
    the architecture does. The result is like any compressed model: :func:`tnlm.save`,
    :func:`tnlm.to_dense` and :func:`tnlm.report` take it.

    Where a format offers several specs, there is no error to choose by: see
    :func:`tnlm.allocation.unseen.roomiest`. Factors are stored whole, as papers count them, unless
    ``gauge=True`` asks for an identity block.

    The model is made on torch's default device; under ``torch.device("meta")`` nothing is
    allocated at all, which is enough to count.

    Args:
        config: of any Hugging Face model; not changed.
        scheme: a name from ``tnlm.schemes()`` that looks at no data.
        model_class: what to make; by default what ``config.architectures`` names, or a causal
            language model.
        targets: the matrices chosen; as in :func:`tnlm.compress`, like all that follow.
        ignore: matrices left alone.
        keep: fraction of the dense model's parameters.
        keep_targets: fraction of the targets' parameters.
        max_macs: multiply-adds per token of a matrix, as a multiple of the dense ones.
        seed: draws the weights.
        dtype: of the weights; the config's if None.
        **options: the format's own.

    Returns:
        The model, in training mode.

    Raises:
        OptionError: for a scheme that looks at data, and as :func:`tnlm.compress` does.
        ModelError: if the config makes no such model, or a chosen matrix starts as zeros.
        TnlmError: other children of it, as :func:`tnlm.compress` does.

    Source: Shapeshifter, Panahi et al. 2021; ALBERT, Lan et al. 2020, arXiv 1909.11942.

    Example:
        >>> from transformers import LlamaConfig
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = from_config(tiny, "svd", rank=4)
        >>> model.model.layers[0].mlp.up_proj.right
        ArrangedLinear(in_features=16, out_features=4, bias=False)
    """
    request = _request(scheme, keep, keep_targets, max_macs, options)
    with torch.inference_mode(False):  # the model can be trained, wherever it was made
        return _make(config, request, model_class, targets, ignore, seed, dtype)


def _make(
    config: PreTrainedConfig,
    request: Request,
    model_class: Any,
    targets: Selector | None,
    ignore: Selector | None,
    seed: int,
    dtype: torch.dtype | str | None,
) -> PreTrainedModel:
    start = time.perf_counter()
    model = skeleton(config, model_class, dtype)
    selection = select(model, request.scheme.targets if targets is None else targets, ignore)
    known = Evidence(request.measure, request.damping)
    job = Job(request, selection, selection.targets, [], [], known)
    decided = settle(model, job, predict=False, progress=False)
    described = _describe(model, selection.targets, decided)
    replaced = [target for target in selection.targets if target.module in described.modules]
    device = torch.get_default_device()
    stds = initialize(model, replaced, described, device, seed)
    place(model, described)
    attach(model, described)
    allocate(model, described, device)
    if device.type != "meta":
        draw(model, replaced, described, stds, seed)
    done = Report(decided, {"build": time.perf_counter() - start})
    model.tnlm_report = done  # type: ignore[assignment]
    return model


def _request(
    scheme: str,
    keep: float | None,
    keep_targets: float | None,
    max_macs: float,
    options: Mapping[str, Any],
) -> Request:
    """Check what is asked; factors are whole by default."""
    named = get_scheme(scheme)
    if named.needs_calibration:
        plain = [name for name, item in schemes().items() if not item.needs_calibration]
        raise OptionError(
            f"scheme {scheme!r} looks at {named.needs} of a trained model, and there is none yet; "
            f"allowed: {', '.join(plain)}"
        )
    fields = {f.name for name in named.formats for f in dataclasses.fields(get_format(name).spec)}
    whole = {"gauge": False} if "gauge" in fields else {}
    return make_request(
        scheme,
        keep=keep,
        keep_targets=keep_targets,
        max_macs=max_macs,
        **whole | dict(options),
    )


def skeleton(
    config: PreTrainedConfig, model_class: Any, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """Return the dense model without any data."""
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"a transformers PreTrainedConfig is wanted, not {type(config).__name__}")
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError("the config is that of a compressed or quantized model; give a dense one")
    if model_class is None:
        named = getattr(transformers, (config.architectures or [""])[0] or "-", None)
        model_class = AutoModelForCausalLM if named is None else named
    make = getattr(model_class, "from_config", None) or getattr(model_class, "_from_config", None)
    if make is None:
        raise ModelError(
            f"model_class={model_class!r}; allowed: a transformers model or Auto class"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = make(
                copy.deepcopy(config), **({} if dtype is None else {"dtype": dtype})
            )
    except (ValueError, TypeError, AttributeError) as error:
        cause = str(error).partition("\n")[0]  # a list of all other models follows
        raise ModelError(
            f"{type(config).__name__} makes no {model_class.__name__}: {cause}; pass model_class="
        ) from error
    return model


def _describe(model: PreTrainedModel, targets: Sequence[Member], decided: Plan) -> TnlmConfig:
    """Return what a checkpoint of the model will say."""
    layers = {layer.name: layer for layer in decided.layers}
    config = TnlmConfig(scheme=decided.scheme, options=decided.request)
    for group in by_module(targets):
        if layers[group[0].name].format is None:  # and so are all parts, being of one shape
            continue
        entries = {
            target.name: target.entry(layers[target.name], biased=target.bias(model) is not None)
            for target in group
        }
        found, ties = group[0].describe(model, group, entries)
        config.modules.update(found)
        config.tied.update(ties)
    return config
