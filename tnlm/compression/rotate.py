"""Rotates a model's residual stream, without changing what the model computes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.errors import ModelError, OptionError
from tnlm.targets.checks import check_model
from tnlm.targets.residual import ResidualStream, residual_stream
from tnlm.targets.stream_trace import trial
from tnlm.utils.undo import leaves_model

EXACT = (torch.float32, torch.float64)
"""Types whose rounding is far below the change of a wrong rotation."""
ORTHOGONAL = 1e-5
"""Largest entry of ``Q.T Q - 1`` of a rotation."""
LEAST_ROUNDING = 1e-4
"""Change of a logit, relative to the largest, that is rounding: norms may work in float32."""


@leaves_model
def rotate(model: PreTrainedModel, rotation: Tensor, *, untie: bool = False) -> PreTrainedModel:
    """Rotate the residual stream of a model in place, and return the model.

    The stream h becomes ``h @ Q``: embeddings and all layers that add to the stream write in the
    new basis, all layers that read it turn it back, and the gains of norms go into the layers that
    read them. The model computes the same logits, up to rounding. It is of the same class, and is
    loaded and compressed like any other; if it is only rotated, ``save_pretrained`` saves it. The
    identity only folds the gains. If anything fails, the model is left unchanged.

    Args:
        model: whose norms are RMSNorms with a weight, by which the readers of the stream are found,
            each read by linear layers, such as Llama, Mistral, Qwen or Gemma. Its logits on a few
            tokens are compared before and after; in half precision, those of a copy in float32,
            where rounding hides no error. All its modules must be run by tokens alone.
        rotation: Q, ``(width, width)``, orthogonal.
        untie: whether a head that shares the weight of the embeddings gets a weight of its own, of
            ``vocabulary x width`` parameters: the gain of the last norm goes into the head
            alone.

    Raises:
        OptionError: if the rotation is not a dense orthogonal matrix as wide as the stream, or
            ``untie`` is no bool.
        ModelError: if a norm cannot be folded, such as a LayerNorm; if the head is tied and
            ``untie`` is false; if other weights are shared, quantized or on the meta device; if
            a module is not run by tokens, such as those for images; or if the logits change.

    Source: computational invariance, SliceGPT (arXiv 2401.15024), with one Q for all blocks.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32,
        ...                    num_hidden_layers=1, num_attention_heads=2)
        >>> model, ids = LlamaForCausalLM(tiny).eval(), torch.arange(8).unsqueeze(0)
        >>> before = model(ids).logits
        >>> model = rotate(model, torch.linalg.qr(torch.randn(16, 16))[0])
        >>> bool(torch.allclose(model(ids).logits, before, atol=1e-5))
        True
    """
    check_model(model)
    if not isinstance(untie, bool):
        raise OptionError(f"untie={untie!r}; allowed: True or False", argument="untie")
    with torch.inference_mode(False), torch.no_grad():
        stream = residual_stream(model)
        turn = _checked(rotation, stream.width)
        if all(parameter.dtype in EXACT for parameter in model.parameters()):
            _rotate(model, stream, turn, untie)
        else:  # rounding would hide a module that was not rotated
            _rotate(nn.Module.float(copy.deepcopy(model)), stream, turn, untie)
            _untie(model, stream, allowed=untie)
            _turn(model, stream, turn)
            trial(model)
    return model


def _rotate(model: Any, stream: ResidualStream, turn: Tensor, untie: bool) -> None:
    """Rotate a model of float32 or float64, whose logits must stay the same."""
    before = trial(model)
    _untie(model, stream, allowed=untie)
    _turn(model, stream, turn)
    _check_same(model, before, trial(model))


def _checked(rotation: Tensor, width: int) -> Tensor:
    """Return a rotation in float64, if it is one of a stream."""
    allowed = f"allowed: an orthogonal matrix of {width} x {width}"
    if not isinstance(rotation, Tensor) or not rotation.is_floating_point():
        raise OptionError(f"rotation={type(rotation).__name__}; {allowed}", argument="rotation")
    if rotation.is_meta or rotation.layout != torch.strided:
        kind = "on the meta device" if rotation.is_meta else "sparse"
        raise OptionError(f"rotation= is {kind}; {allowed}, dense", argument="rotation")
    if rotation.shape != (width, width):
        shape = " x ".join(map(str, rotation.shape)) or "a scalar"
        raise OptionError(f"rotation= is {shape}; {allowed}", argument="rotation")
    turn = rotation.detach().double()
    apart = (turn.T @ turn - torch.eye(width).to(turn)).abs().max()
    if not float(apart) <= ORTHOGONAL:
        raise OptionError(f"rotation= is not orthogonal; {allowed}", argument="rotation")
    return turn


def _untie(model: PreTrainedModel, stream: ResidualStream, *, allowed: bool) -> None:
    """Give every reader that shares the weight of the embeddings a weight of its own."""
    table: Any = model.get_submodule(stream.table)
    tied = [name for name in stream.readers if _module(model, name).weight is table.weight]
    if not tied:
        return
    if not allowed:
        raise ModelError(
            f"{tied[0]} shares its weight with {stream.table}, but the gain of the norm before it "
            "goes into the head alone; untie=True gives it a weight of its own, which adds "
            f"{table.weight.numel():,} parameters"
        )
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    for name in tied:
        _put(_module(model, name), "weight", table.weight.clone())
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _turn(model: PreTrainedModel, stream: ResidualStream, turn: Tensor) -> None:
    """Change the basis of all that reads and writes the stream."""
    table = _module(model, stream.table)
    _put(table, "weight", _double(table.weight) @ turn.to(table.weight.device))
    for name, found in stream.norms.items():
        norm = _module(model, name)
        gain = _double(norm.weight) + found.offset
        for reader in found.readers:
            linear = _module(model, reader)
            there = linear.weight.device
            folded = _double(linear.weight) * gain.to(there)
            _put(linear, "weight", folded @ turn.to(there))
        _put(norm, "weight", torch.full_like(norm.weight, 1.0 - found.offset))
    for writer in stream.writers:
        linear = _module(model, writer)
        there = linear.weight.device
        _put(linear, "weight", turn.T.to(there) @ _double(linear.weight))
        if linear.bias is not None:
            _put(linear, "bias", _double(linear.bias) @ turn.to(there))


def _check_same(model: PreTrainedModel, before: Tensor, after: Tensor) -> None:
    """Raise `ModelError` if the logits are no longer the same, up to rounding."""
    close = max(torch.finfo(before.dtype).eps ** 0.5, LEAST_ROUNDING)
    change = float((after.double() - before.double()).abs().max() / before.double().abs().max())
    if not change <= close:
        raise ModelError(
            f"rotating the residual stream of {type(model).__name__} changes its logits by "
            f"{change:.2g} of the largest: something else reads or writes the stream, such as "
            "experts, position embeddings, or layers outside of its blocks"
        )


def _put(module: Any, name: str, values: Tensor) -> None:
    """Replace a parameter by a new one, so that the old one can be restored."""
    old = getattr(module, name)
    new = nn.Parameter(values.to(old), requires_grad=old.requires_grad)
    setattr(module, name, new)


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().double()


def _module(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)
