"""Gradients of the loss at the ends of a stack of blocks, and back through one of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tnlm.calibration.blocks import Blocks
from tnlm.calibration.bypass import bypassed
from tnlm.calibration.loss import Task
from tnlm.calibration.passes import run
from tnlm.calibration.walk import Call, call_block, take_state


def top(model: PreTrainedModel, blocks: Blocks, task: Task, state: Tensor, like: Any) -> Tensor:
    """Return the gradient at the last block's output, given this, without running the blocks."""
    leaf = leaf_of(state)
    with bypassed(model, blocks, like, leaf.clone()):
        back(task.loss(model, run(model, task.batch)))
    return gradient_of(leaf)


def bottom(model: PreTrainedModel, blocks: Blocks, task: Task) -> Tensor:
    """Return the gradient at the first block's input, through all paths to the loss."""
    leaves: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state, (rest, named) = take_state(args, kwargs)
        if state is None:
            return args, kwargs
        leaves.append(leaf_of(state))
        return (leaves[0].clone(), *rest), named

    handle = blocks[0][1].register_forward_pre_hook(before, with_kwargs=True)
    try:
        back(task.loss(model, run(model, task.batch)))
    finally:
        handle.remove()
    return gradient_of(leaves[0])


def pull(block: nn.Module, call: Call, state: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at a block's input, from the one at its output."""
    leaf = leaf_of(state)
    back(call_block(block, leaf.clone(), call), gradient)
    return gradient_of(leaf)


def leaf_of(tensor: Tensor) -> Tensor:
    """Return the start of a graph; models get a copy, since they may change it in place."""
    return tensor.detach().requires_grad_()


def back(output: Tensor, gradient: Tensor | None = None) -> None:
    """Take a gradient back from an output, if anything that is watched led to it."""
    if output.requires_grad:
        torch.autograd.backward(output, gradient)


def gradient_of(leaf: Tensor) -> Tensor:
    """Return the gradient at the start of a graph, zero if none came there."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
