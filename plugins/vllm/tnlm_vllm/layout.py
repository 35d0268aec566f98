"""What an exported model's config.json says of its layers, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAYOUT = 1
"""Version of the description that is read here."""
WEIGHT, ORDER = "weight", "order"
"""Names of a dense layer's tensor and of a row order."""
CODES, SCALES = "_codes", "_scales"
"""What follows the name of a factor that is stored as int8 codes, and scales of its rows."""


class LayoutError(ValueError):
    """A description that cannot be run."""


@dataclass(frozen=True)
class Step:
    """One product of the activation with one factor.

    Attributes:
        tensor: name of the factor.
        rows: of the factor as stored.
        columns: likewise.
        blocks: the factor is so many matrices, one for each block of the activation, stacked.
        permute: how the activation's modes are reordered first, or None.
        rest: sizes of the activation's modes that the product leaves alone.
        after: sizes of all modes after it.
        identity: ``"out"`` if its inputs are copied to the outputs before its own, ``"in"`` if the
            first inputs are added to the result; both through ``order``. Else None.
        int8: whether it is stored as int8 codes with a scale for every row.
    """

    tensor: str
    rows: int
    columns: int
    blocks: int
    permute: tuple[int, ...] | None
    rest: tuple[int, ...]
    after: tuple[int, ...]
    identity: str | None
    int8: bool

    @property
    def is_flat(self) -> bool:
        """Whether it is one product with the whole activation as it is."""
        return self.permute is None and self.blocks == 1 and math.prod(self.rest) == 1

    @property
    def width(self) -> int:
        """Inputs of the product, for each block and each index of ``rest``."""
        return self.columns + (self.rows if self.identity == "in" else 0)

    @property
    def outputs(self) -> int:
        """Outputs of the product, likewise."""
        return self.rows // self.blocks + (self.columns if self.identity == "out" else 0)


@dataclass(frozen=True)
class Layer:
    """A linear layer as a chain of products.

    Attributes:
        shape: ``(out, in)`` of the matrix.
        modes: sizes into which the inputs split.
        steps: in the order in which they are run.
        permute: how the modes are reordered at last, or None.
    """

    shape: tuple[int, int]
    modes: tuple[int, ...]
    steps: tuple[Step, ...]
    permute: tuple[int, ...] | None

    def tensors(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and kind (``"weight"``, ``"codes"`` or ``"order"``) of each tensor."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for step in self.steps:
            if step.int8:
                found[step.tensor + CODES] = ((step.rows, step.columns), "codes")
                found[step.tensor + SCALES] = ((step.rows,), "weight")
            else:
                found[step.tensor] = ((step.rows, step.columns), "weight")
            if step.identity is not None:
                found[ORDER] = ((step.rows + step.columns,), "order")
        return found


def dense(shape: tuple[int, int]) -> Layer:
    """Return the description of an ordinary layer: one product.

    Example:
        >>> dense((4, 8)).tensors()
        {'weight': ((4, 8), 'weight')}
    """
    rows, columns = shape
    step = Step(WEIGHT, rows, columns, 1, None, (), (rows,), None, False)
    return Layer(shape, (columns,), (step,), None)


def read_layers(config: Mapping[str, Any]) -> dict[str, Layer]:
    """Return the layers of a config's ``quantization_config``, by name.

    Raises:
        LayoutError: if it was not written for vLLM, by another version, or is broken.

    Example:
        >>> read_layers({"quant_method": "tnlm", "modules": {}})
        Traceback (most recent call last):
        tnlm_vllm.layout.LayoutError: this model was saved by tnlm, not exported for vLLM: ...
    """
    if config.get("runtime") != "vllm":
        raise LayoutError(
            "this model was saved by tnlm, not exported for vLLM: run `tnlm export MODEL OUT --to "
            "vllm`, and serve OUT"
        )
    if config.get("layout") != LAYOUT:
        raise LayoutError(
            f"config.json has layout {config.get('layout')!r}, and this tnlm-vllm reads {LAYOUT}: "
            "export the model again, or `pip install plugins/vllm` from a checkout of the "
            "version of tnlm that wrote it"
        )
    try:
        found = {name: _layer(entry) for name, entry in config["layers"].items()}
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise LayoutError(f"config.json has a broken quantization_config: {error!r}") from error
    for name, layer in found.items():
        _check(name, layer)
    return found


def _layer(entry: Mapping[str, Any]) -> Layer:
    rows, columns = entry["shape"]
    steps = tuple(_step(step) for step in entry["steps"])
    return Layer((int(rows), int(columns)), _sizes(entry["modes"]), steps, _some(entry["permute"]))


def _step(said: Mapping[str, Any]) -> Step:
    return Step(
        tensor=str(said["tensor"]),
        rows=int(said["rows"]),
        columns=int(said["columns"]),
        blocks=int(said["blocks"]),
        permute=_some(said["permute"]),
        rest=_sizes(said["rest"]),
        after=_sizes(said["after"]),
        identity=said["identity"],
        int8=bool(said["int8"]),
    )


def _sizes(given: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in given)


def _some(given: Any) -> tuple[int, ...] | None:
    return None if given is None else _sizes(given)


def _check(name: str, layer: Layer) -> None:
    """Raise `LayoutError` unless every step takes what the one before it gives."""
    sizes = layer.modes
    for step in layer.steps:
        taken = math.prod(step.rest) * step.blocks * step.width
        given = math.prod(step.rest) * step.blocks * step.outputs
        whole = min(step.rows, step.columns, step.blocks) > 0 and step.rows % step.blocks == 0
        known = step.identity in (None, "in", "out")
        known = known and not (step.blocks > 1 and (step.identity or step.int8))
        moved = step.permute is None or sorted(step.permute) == list(range(len(sizes)))
        fits = math.prod(sizes) == taken and math.prod(step.after) == given
        if not (whole and known and moved and fits):
            raise LayoutError(f"config.json has a step of {name} that does not fit: {step}")
        sizes = step.after
    ends = layer.permute is None or sorted(layer.permute) == list(range(len(sizes)))
    if (math.prod(sizes), math.prod(layer.modes)) != layer.shape or not layer.steps or not ends:
        raise LayoutError(f"config.json has steps of {name} that make no {layer.shape} matrix")
