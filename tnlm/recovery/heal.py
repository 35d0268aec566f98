"""heal: trains LoRAs in a compressed model, with everything else frozen, and merges them."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.labels import check_labels
from tnlm.calibration.text import AUTO
from tnlm.calibration.walk import eval_mode
from tnlm.errors import OptionError, TargetError, TrainingError, did_you_mean
from tnlm.layers.adapters import Lora, attach, attached, check_bare, matrix, size_at, size_of
from tnlm.layers.adapters import check as check_ranks
from tnlm.layers.linear import FactorizedLinear
from tnlm.layers.made import made_layers
from tnlm.layers.packed import PackedLinear
from tnlm.layers.submatrix import SubmatrixLinear
from tnlm.metrics.metric import Metric
from tnlm.recovery.compensate import residual_start
from tnlm.recovery.goals import check_teacher, divergence_from, hold_out, own_loss
from tnlm.recovery.lora_training import schedule_of, train
from tnlm.recovery.merging import charge, check_merge, merge_layers
from tnlm.recovery.model_kinds import batches_for
from tnlm.utils.checks import is_whole
from tnlm.utils.undo import attempt, leaves_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGES = {
    "factors": ("factors", "adapter"),
    "layers": ("concatenate", "retruncate", "adapter"),
}
"""Ways to merge a trained LoRA, by its place; the default first."""

STARTS = ("zero", "residual")


@leaves_model
def heal(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    text: str = "text",
    label: str = "label",
    bos: bool | str = AUTO,
    modules: Sequence[str] | None = None,
    on: str = "factors",
    rank: int = 8,
    alpha: float = 16.0,
    learning_rate: float = 2e-4,
    tokens: int = 2**18,
    start: str = "zero",
    merge: str | None = None,
    originals: Mapping[str, Tensor] | None = None,
    metrics: Mapping[str, Metric] | None = None,
    teacher: PreTrainedModel | None = None,
    seed: int = 0,
    progress: bool = True,
) -> PreTrainedModel:
    """Recover quality after compression: train LoRAs, all else frozen, and merge them in place.

    With ``on="factors"`` (the default, for every format), each factor gets a LoRA that is merged
    into it; ranks, parameter counts and identity blocks do not change. With ``on="layers"``, for
    low-rank layers, each product gets a LoRA beside it. ``merge`` sets how LoRAs are merged:

    - ``"factors"``: add the LoRA to its factor; the codes of a packed factor stay on their scales,
      so what is less than half a step is lost: keep the adapter there;
    - ``"concatenate"``: exact; the rank grows by the LoRA's;
    - ``"retruncate"``: merge, and truncate to the layer's previous rank;
    - ``"adapter"``: leave the LoRAs in the model as PEFT layers, with frozen factors. Save them
      with ``peft.get_peft_model_state_dict``; `tnlm.save` needs the model without them.

    With a ``teacher``, training matches its predictions, and no label is learnt. LoRAs that went
    too far are taken back by a half, three quarters and so on, as long as that lowers the loss
    (with a teacher, on batches that were held out); to the start if no part helps. The model runs
    in eval mode. If anything fails, it is left unchanged. ``tnlm.report(model)`` includes the added
    parameters, and drops the errors of changed matrices.

    Args:
        model: a compressed model.
        data: as for :func:`tnlm.recovery.training.finetune`; or batches of ``input_ids``,
            ``attention_mask`` and ``labels``, such that ``model(**batch).loss`` is the mean loss.
        tokenizer: needed for texts.
        batch_size: examples per step and process, if the data is not in batches.
        max_length: tokens per example, likewise.
        text: name of the rows' text column, likewise.
        label: name of the rows' class column, for classifiers, likewise.
        bos: whether a window of text starts with BOS, likewise: True, False, or ``"auto"`` to
            follow the tokenizer.
        modules: dotted names of the layers to heal; all compressed linear layers by default. A
            dense or narrowed layer counts as one factor.
        on: ``"factors"`` or ``"layers"``. Factors shared by several layers are not changed.
        rank: rank of each LoRA, limited by the size of its factor.
        alpha: the LoRA's product is multiplied by ``alpha / rank``.
        learning_rate: peak learning rate of AdamW.
        tokens: how many tokens to train on; batches are repeated if there are fewer.
        start: ``"zero"``, or ``"residual"`` for the difference between ``originals`` and the layer.
        merge: see above; ``"factors"`` or ``"concatenate"`` by default.
        originals: dense weights ``(out, in)`` by module name, for ``start="residual"``.
        metrics: metrics by module name, for ``merge="retruncate"``; the Frobenius norm by default.
        teacher: the dense model, to match KL(teacher || model); None to learn the data's labels.
        seed: draws the LoRAs and the order of batches.
        progress: show a progress bar.

    Returns:
        The same model.

    Raises:
        OptionError: if options are out of range or incompatible.
        RankError: if a layer cannot have the rank, or would be larger than dense.
        TargetError: if there is no layer to heal.
        ModelError: if the model has adapters, or a factor to merge into is quantized.
        CalibrationError: if there is no batch, label or prediction.
        TrainingError: if a loss is not finite.

    Source: LoRA, Hu et al. 2021, arXiv 2106.09685; after SVD as in SVD-LLM, arXiv 2403.07378.

    Example:
        >>> import tnlm
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model = tnlm.compress(LlamaForCausalLM(tiny), "svd", keep_targets=0.5)
        >>> ids = torch.arange(16).reshape(2, 8)
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> model = heal(model, [batch], rank=2, tokens=64, progress=False)
        >>> model.model.layers[0].mlp.up_proj.right
        ArrangedLinear(in_features=10, out_features=6, bias=False)
    """
    began = time.perf_counter()
    check_bare(model)
    check_teacher(model, teacher)
    _check_numbers(rank, alpha, learning_rate, tokens)
    batches = batches_for(
        model,
        data,
        tokenizer,
        batch_size,
        max_length=max_length,
        text=text,
        label=label,
        max_tokens=tokens,
        seed=seed,
        bos=bos,
    )
    merge = _check(model, batches, on, start, merge, originals, metrics)
    names = _names(model, modules)
    ranks = _on_factors(model, names, rank) if on == "factors" else dict.fromkeys(names, rank)
    check_ranks(model, ranks)
    check_merge(model, ranks, merge)
    starts = _starts(model, ranks, alpha / rank, originals) if originals is not None else {}
    for name in set(metrics or {}) - set(names):
        raise TargetError(f"metrics name {name!r}, which is not healed")
    goal = own_loss if teacher is None else divergence_from(teacher)
    shown, held = (batches, None) if teacher is None else hold_out(model, batches)
    order = schedule_of(shown, tokens, seed)
    resting = contextlib.nullcontext() if teacher is None else eval_mode(teacher)
    with attached(model, ranks, alpha / rank, seed) as adapters, eval_mode(model), resting:
        for name, lora in starts.items():
            adapters[name].fill(lora)
        train(model, adapters, shown, order, learning_rate, progress, goal, held)
        loras = {name: adapter.lora() for name, adapter in adapters.items()}
    for name, lora in loras.items():
        if not bool(lora.A.isfinite().all() and lora.B.isfinite().all()):
            raise TrainingError(f"the LoRA at {name} is not finite; lower learning_rate")
    changed = loras if merge == "factors" else ()
    before = {name: copy.deepcopy(model.get_submodule(name).state_dict()) for name in changed}

    def finish() -> PreTrainedModel:
        if merge == "factors":
            _add(model, loras)
        elif merge == "adapter":
            for name, adapter in attach(model, ranks, alpha / rank, seed).items():
                adapter.fill(loras[name])
        else:
            merge_layers(model, loras, merge, metrics or {})
        charge(model, names, loras if merge == "adapter" else {}, time.perf_counter() - began)
        return model

    def undo() -> None:
        for name, state in before.items():
            model.get_submodule(name).load_state_dict(state)

    return attempt(finish, undo)


def _names(model: nn.Module, modules: Sequence[str] | None) -> list[str]:
    if modules is not None:
        return list(modules)
    made = [layer for layer in made_layers(model) if layer.approximated]
    found = [layer.name for layer in made if layer.linear]
    if not found:
        others = ", ".join(layer.name for layer in made)
        only = f", only {others}, which take no LoRA" if made else ""
        raise TargetError(f"the model has no compressed linear layer{only}; name some in modules=")
    return found


def _on_factors(model: nn.Module, names: Sequence[str], rank: int) -> dict[str, int]:
    """Return the rank of every factor's LoRA, by the factor's name."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    ranks = {}
    for name in names:
        layer, inner = modules.get(name), [name]
        if isinstance(layer, FactorizedLinear):
            inner = [f"{name}.{factor}" for factor in layer.chain.order]
        elif isinstance(layer, SubmatrixLinear):
            inner = [f"{name}.core"]
        for full in inner:
            most = min(size_at(modules, full))
            held = modules[full]._parameters
            own = owners[id(held.get("scales", held.get("weight")))] == 1
            if own and most > 0:
                ranks[full] = min(rank, most)
    if not ranks:
        raise TargetError("every factor is shared by several layers; use on='layers'")
    return ranks


def _starts(
    model: nn.Module, ranks: Mapping[str, int], scaling: float, originals: Mapping[str, Tensor]
) -> dict[str, Lora]:
    found = {}
    for name, rank in ranks.items():
        layer: Any = model.get_submodule(name)
        if name not in originals or originals[name].shape != size_of(layer):
            raise OptionError(
                f"start='residual' needs the dense weight {size_of(layer)} of {name} in originals"
            )
        fitted = matrix(layer)
        original = originals[name].to(fitted.device)
        found[name] = residual_start(original, fitted, rank, scaling)
    return found


@torch.no_grad()
def _add(model: nn.Module, loras: Mapping[str, Lora]) -> None:
    """Add every LoRA to its weight."""
    for name, lora in loras.items():
        layer, delta = model.get_submodule(name), lora.delta()
        if isinstance(layer, PackedLinear):
            layer.add(delta)
        else:
            matrix(layer).copy_(matrix(layer).double() + delta)


def _check(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    on: str,
    start: str,
    merge: str | None,
    originals: Mapping[str, Tensor] | None,
    metrics: Mapping[str, Metric] | None,
) -> str:
    """Check that the choices are compatible, and return the kind of merge."""
    check_labels(model, batches)
    if on not in MERGES:
        raise OptionError(f"on={on!r}{did_you_mean(str(on), MERGES)}")
    merge = MERGES[on][0] if merge is None else merge
    if merge not in MERGES[on]:
        raise OptionError(f"merge={merge!r} with on={on!r}{did_you_mean(str(merge), MERGES[on])}")
    if start not in STARTS:
        raise OptionError(f"start={start!r}{did_you_mean(str(start), STARTS)}")
    if (start == "residual") != (originals is not None):
        raise OptionError(f"start={start!r}: originals= must be given with start='residual' only")
    if start == "residual" and on != "layers":
        raise OptionError("start='residual' needs on='layers': a factor has no residual")
    if metrics and merge != "retruncate":
        raise OptionError(f"metrics= has no effect with merge={merge!r}; use merge='retruncate'")
    return merge


def _check_numbers(rank: int, alpha: float, learning_rate: float, tokens: int) -> None:
    for name, number in (("rank", rank), ("tokens", tokens)):
        if not is_whole(number) or number < 1:
            raise OptionError(f"{name}={number!r}; allowed: a whole number >= 1")
    for name, value in (("alpha", alpha), ("learning_rate", learning_rate)):
        if not 0 < value < math.inf:
            raise OptionError(f"{name}={value!r}; allowed: a number above 0")
