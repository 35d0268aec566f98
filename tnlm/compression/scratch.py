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

from tnlm.allocation.uniform import stay_dense
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
    """Build a model with factorized matrices and random weights, to train from scratch.

    Nothing is fitted, and the dense matrices are not allocated, except briefly one linear layer of
    each kind and some rows of each embedding, to see how the architecture initialises them. The
    product of the factors gets the same standard deviation, see
    :func:`tnlm.tensors.gaussian.gaussian`. Biases are 0; the architecture initialises everything
    else. :func:`tnlm.save`, :func:`tnlm.to_dense` and :func:`tnlm.report` accept the result like
    any compressed model.

    Without weights there is no error by which to choose among several specs; instead, see
    :func:`tnlm.allocation.unseen.roomiest`. Factors are stored whole, as papers count them;
    ``gauge=True`` stores an identity block implicitly.

    The model is built on torch's default device. Under ``torch.device("meta")`` nothing is
    allocated, which is enough to count parameters.

    Args:
        config: the config of any Hugging Face model; left unchanged.
        scheme: a name from ``tnlm.list_schemes()``, of a scheme that needs no data.
        model_class: the class to build; by default the one in ``config.architectures``, or a
            causal language model.
        targets: the matrices to factorize, as in :func:`tnlm.compress`.
        ignore: matrices to leave dense.
        keep: fraction of the dense model's parameters to keep.
        keep_targets: fraction of the targets' parameters to keep.
        max_macs: most multiply-adds per matrix, as a multiple of dense.
        seed: draws the weights.
        dtype: dtype of the weights; the config's if None.
        **options: options of the scheme's formats.

    Returns:
        The model, in training mode.

    Raises:
        OptionError: if the scheme needs data, and as in :func:`tnlm.compress`.
        ModelError: if the config cannot build the model, or a target is initialised to zeros.
        TnlmError: other subclasses, as in :func:`tnlm.compress`.

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
    with torch.inference_mode(False):  # keeps the model trainable, wherever it is built
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
    chosen = request.scheme.targets if targets is None else targets
    selection = select(model, chosen, ignore, split=request.scheme.split)
    known = Evidence(request.measure, request.damping)
    job = Job(request, selection, selection.targets, [], [], known)
    decided = settle(model, job, predict=False, progress=False)
    described = _describe(model, selection.targets, decided)
    replaced = [
        target
        for group in by_module(selection.targets)
        if group[0].module in described.modules
        for target in group
    ]
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
    """Check the request; factors are stored whole by default."""
    named = get_scheme(scheme)
    if named.needs_calibration:
        plain = [name for name, item in schemes().items() if not item.needs_calibration]
        raise OptionError(
            f"scheme {scheme!r} needs {named.needs} from a trained model, and there is none yet; "
            f"allowed: {', '.join(plain)}"
        )
    fields = {f.name for name in named.formats for f in dataclasses.fields(get_format(name).spec)}
    whole = {"gauge": False} if "gauge" in fields else {}
    request = make_request(
        scheme,
        keep=keep,
        keep_targets=keep_targets,
        max_macs=max_macs,
        **whole | dict(options),
    )
    if request.grids != (None,):
        raise OptionError(
            f"precision={request.scheme.precision!r} of a model that is not trained yet: codes do "
            "not change in training; train it, then compress it",
            argument="precision",
        )
    return request


def skeleton(
    config: PreTrainedConfig, model_class: Any, dtype: torch.dtype | str | None
) -> PreTrainedModel:
    """Return the dense model on the meta device."""
    if not isinstance(config, PreTrainedConfig):
        raise ModelError(f"expected a transformers PreTrainedConfig, got {type(config).__name__}")
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
            f"{type(config).__name__} cannot build {model_class.__name__}: {cause}; "
            "pass model_class="
        ) from error
    return model


def _describe(model: PreTrainedModel, targets: Sequence[Member], decided: Plan) -> TnlmConfig:
    """Return the description that a checkpoint of the model will hold."""
    layers = {layer.name: layer for layer in decided.layers}
    config = TnlmConfig(scheme=decided.scheme, options=decided.request)
    for group in by_module(targets):
        decisions = [
            layers.get(target.name) or stay_dense(target, target.weight(model), "not chosen")
            for target in group
        ]
        if all(layer.format is None for layer in decisions):
            continue
        entries = {
            target.name: target.entry(layer, biased=target.bias(model) is not None)
            for target, layer in zip(group, decisions, strict=True)
        }
        found, ties = group[0].describe(model, group, entries)
        config.modules.update(found)
        config.tied.update(ties)
    return config
