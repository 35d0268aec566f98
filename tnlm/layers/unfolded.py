"""Unfolds experts: one linear layer for every matrix of every expert, while a job runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tnlm.layers.expert_layout import ExpertLayout, layout_of

TOKENS = 4
"""Number of tokens per expert on which an unfolded module is compared with its original."""
CLOSE = 64
"""Outputs may differ by this many units in the last place of the largest."""


class Kept:
    """The original of an unfolded module; copies of a model share it, since it never changes."""

    def __init__(self, module: nn.Module) -> None:
        """Store the module."""
        self.module = module

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        """Return the same object."""
        return self


class Expert(nn.Module):
    """One expert: ``down(act(gate(x), up(x)))`` of linear layers.

    Args:
        owner: the module of all experts, without its parameters.
        layout: the layout of its parameters.
        matrices: this expert's matrices, by name.
    """

    def __init__(
        self, owner: nn.Module, layout: ExpertLayout, matrices: dict[str, nn.Linear]
    ) -> None:
        """Store the matrices; see the class for the arguments."""
        super().__init__()
        self.layout = layout
        self.__dict__["owner"] = owner  # not a child: all experts share it
        for name, matrix in matrices.items():
            self.add_module(name, matrix)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert to ``(tokens, hidden)``."""
        own: Any = self
        up = own.up_proj(x)
        gate = own.gate_proj(x) if self.layout.gated else None
        output: Tensor = own.down_proj(activated(own.owner, self.layout, gate, up))
        return output


def activated(owner: Any, layout: ExpertLayout, gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of ``down_proj``, computed by the original module's code."""
    if gate is None:
        inner: Tensor = owner.act_fn(up)
    else:
        inner = owner._apply_gate(layout.join(gate, up))
    return inner


def normed(owner: Any, output: Tensor) -> Tensor:
    """Return an expert's output after the norm, if the original module has one."""
    after: Tensor = owner.post_expert_norm(output) if owner.has_post_expert_norm else output
    return after


class UnfoldedExperts(nn.ModuleList):
    """All experts of a module as separate ones, whose linear layers are views of its parameters.

    It is called like transformers' experts, and gives the same outputs.
    """

    def __init__(self, module: nn.Module, layout: ExpertLayout) -> None:
        """Unfold a module, sharing its parameters."""
        owner = bare(module, layout)
        weights = {name: layout.weight(module, name) for name in layout.shapes}
        biases = {name: layout.bias(module, name) for name in layout.shapes}
        learns = {n: getattr(module, layout.holder(n)).requires_grad for n in layout.shapes}
        super().__init__(
            Expert(
                owner,
                layout,
                {
                    name: _linear(weights[name][e], _at(biases[name], e), learns[name])
                    for name in layout.shapes
                },
            )
            for e in range(layout.experts)
        )
        for name, child in owner.named_children():
            self.add_module(name, child)
        self.layout = layout
        self.__dict__["owner"], self.__dict__["original"] = owner, Kept(module)
        self.train(module.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum the outputs of the experts to which each token is routed, ``(tokens, hidden)``."""
        total = torch.zeros_like(hidden_states)
        for number in range(self.layout.experts):
            token, slot = torch.where(top_k_index == number)
            if len(token):
                output = normed(self.owner, self[number](hidden_states[token]))
                weighted = output * top_k_weights[token, slot, None]
                total = total.index_add(0, token, weighted.to(total.dtype))
        return total

    def __len__(self) -> int:
        """Return the number of experts, without a norm beside them."""
        return self.layout.experts if "layout" in vars(self) else super().__len__()


def bare(module: nn.Module, layout: ExpertLayout) -> nn.Module:
    """Return a copy of an experts module without its 3-D parameters and biases."""
    made = copy.copy(module)
    kept = {n: p for n, p in module._parameters.items() if n not in layout.parameters}
    made.__dict__["_parameters"] = kept
    for held in ("_buffers", "_modules"):
        made.__dict__[held] = dict(getattr(module, held))
    return made


def _linear(weight: Tensor, bias: Tensor | None, learns: bool) -> nn.Linear:
    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=learns)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=learns)
    return layer


def _at(stack: Tensor | None, index: int) -> Tensor | None:
    return None if stack is None else stack[index]


def unfold(model: nn.Module) -> dict[str, str]:
    """Replace every experts module by linear layers that share its parameters.

    Each is checked first: on random tokens, its outputs must match the module's.

    Args:
        model: changed in place; :func:`refold` undoes it.

    Returns:
        The reasons why experts modules were left unchanged, by name.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> model = MixtralForCausalLM(MixtralConfig(vocab_size=16, hidden_size=8,
        ...     intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2, num_local_experts=2))
        >>> unfold(model)
        {}
        >>> model.model.layers[0].mlp.experts[1].up_proj
        Linear(in_features=8, out_features=12, bias=False)
        >>> refold(model)
        >>> type(model.model.layers[0].mlp.experts).__name__
        'MixtralExperts'
    """
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        layout = layout_of(module)
        if not isinstance(layout, ExpertLayout):
            continue
        reason = objection(module)
        if reason is None:
            model.set_submodule(name, UnfoldedExperts(module, layout))
        else:
            left[name] = reason
    return left


def objection(module: nn.Module) -> str | None:
    """Return why experts of a known layout are left as they are, or None if they unfold."""
    layout = layout_of(module)
    if not isinstance(layout, ExpertLayout):
        return layout
    return _held(module) or _difference(module, layout)


def refold(model: nn.Module) -> None:
    """Restore every unfolded experts module, as the same object as before."""
    for name, module in list(unfolded(model)):
        kept: Any = module.original
        model.set_submodule(name, kept.module)


def unfolded(model: nn.Module) -> Iterator[tuple[str, UnfoldedExperts]]:
    """Yield the unfolded modules of a model, with their names."""
    for name, module in model.named_modules():
        if isinstance(module, UnfoldedExperts):
            yield name, module


def _held(module: nn.Module) -> str | None:
    """Return why a module's parameters cannot be shared, or None."""
    if getattr(module, "_hf_hook", None):
        return "its parameters are offloaded by accelerate; compress before dispatching"
    plain = all(type(p) is nn.Parameter and p.is_floating_point() for p in module.parameters())
    return None if plain else "its parameters are no plain tensors; load the model unquantized"


@torch.no_grad()
def _difference(module: nn.Module, layout: ExpertLayout) -> str | None:
    """Return why a module cannot be replaced by its separate experts, or None."""
    like: Any = getattr(module, layout.parameters[0])
    if like.is_meta:
        return None
    name = type(module).__name__
    generator = torch.Generator().manual_seed(0)
    tokens, count = TOKENS * layout.experts, min(2, layout.experts)
    x = torch.randn(tokens, layout.hidden, generator=generator).to(like)
    index = (torch.arange(tokens)[:, None] + torch.arange(count)) % layout.experts
    weights = torch.rand(tokens, count, generator=generator).to(like)
    call = x, index.to(like.device), weights
    twin = UnfoldedExperts(module, layout)
    try:
        expected, found = module(*call), twin(*call)
    except Exception as error:  # the model's code may raise anything
        return f"{name} cannot be tried by itself ({type(error).__name__}: {error})"
    size = float(expected.abs().max()) if expected.numel() else 0.0
    bound = CLOSE * torch.finfo(like.dtype).eps * size
    if expected.shape == found.shape and float((expected - found).abs().max()) <= bound:
        return None
    return f"{name} does more than its experts one by one"
