"""What is checked of a family and a scheme; every failing check keeps the text of its error."""

from __future__ import annotations

import copy
import inspect
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from family_configs import auto_class, families, tiny_model
from family_inputs import inputs_of, modality
from torch import Tensor, nn
from transformers import PreTrainedModel

import tnlm
from tnlm.errors import TnlmError
from tnlm.plans.plan import Plan
from tnlm.schemes import get_scheme
from tnlm.targets.mixtures import expert_shares, holds_experts

SCHEMES = ("svd", "kron", "tt", "svd-llm", "auto")
KEEP = 0.6
"""Fraction of the targets' parameters asked for."""
TOLERANCE = 1e-3
"""Largest relative difference of outputs after ``to_dense``: its weights are products, rounded."""
ALL_SAID = "what is replaced and what is left are all parameters of two or more dimensions"


@dataclass
class Row:
    """One family under one scheme.

    Attributes:
        family: model type.
        cls: class of the model.
        modality: what it reads.
        scheme: by name.
        params: of the dense model.
        body: parameters of two or more dimensions in its blocks.
        share: of the body, that are targets.
        mixture: whether it has routed experts.
        left: groups of what was left: kind, name, parameters, reason.
        checks: True, None where the dense model cannot do it either, or the error's text.
        seconds: wall time.
    """

    family: str
    cls: str
    scheme: str
    modality: str = ""
    params: int = 0
    body: int = 0
    share: float | None = None
    mixture: bool = False
    left: list[list[Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether no check fails."""
        return bool(self.checks) and all(said in (True, None) for said in self.checks.values())

    @property
    def says_why(self) -> bool:
        """Whether each failing check ends in an error of tnlm's own."""
        failed = [said for said in self.checks.values() if said not in (True, None)]
        return all(str(said).startswith("TnlmError") for said in failed)


def check(family: str, scheme: str) -> Row:
    """Return what every check says of a family and a scheme."""
    start = time.perf_counter()
    row = Row(family, families()[family], scheme)
    model = tiny_model(family)
    inputs = inputs_of(model)
    row.modality = modality(model)
    row.mixture = bool(expert_shares(model)) or any(
        _holds_stacks(*each) for each in model.named_modules()
    )
    row.params = sum(p.numel() for p in set(model.parameters()))
    dense = copy.deepcopy(model)
    checks = row.checks
    if _try(checks, "compresses", lambda: _compress(model, scheme, inputs)):
        plan = tnlm.report(model).plan
        _describe(row, plan)
        _try(checks, "listed", lambda: _listed(dense, plan))
        _try(checks, "counts", lambda: _counts(model))
        _try(checks, "reproducible", lambda: _reproducible(model, inputs))
        _try(checks, "loads", lambda: _loads(model, inputs))
        _try(checks, "dense", lambda: _dense(copy.deepcopy(model), model, inputs))
        _try(checks, "trains", lambda: _trains(dense, copy.deepcopy(model), inputs))
        _try(checks, "generates", lambda: _generates(dense, model, inputs))
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _try(checks: dict[str, Any], name: str, work: Callable[[], Any]) -> bool:
    """Note what a check says; whatever it raises is noted, and is a bug unless it is ours."""
    try:
        said = work()
        checks[name] = True if said is None else said or None
    except TnlmError as error:
        checks[name] = f"TnlmError: {type(error).__name__}: {error}"
    except Exception as error:
        checks[name] = f"{type(error).__name__}: {error}"
    return checks[name] is True


def _holds_stacks(name: str, module: nn.Module) -> bool:
    """Whether a module holds experts in parameters of its own."""
    stacks = (p for p in module.parameters(recurse=False) if p.dim() > 1)
    return holds_experts(name, module) and any(True for _ in stacks)


def _compress(model: PreTrainedModel, scheme: str, inputs: dict[str, Tensor]) -> None:
    data = {"calibration": [inputs]} if get_scheme(scheme).needs_calibration else {}
    tnlm.compress(model, scheme, keep_targets=KEEP, progress=False, **data)


def _describe(row: Row, plan: Plan) -> None:
    covered = plan.coverage
    if covered is not None:
        row.body, row.share = covered.body, round(covered.share, 4)
        row.left = [[e.kind, e.name, e.params, e.reason, e.in_body] for e in covered.left]


def _listed(dense: PreTrainedModel, plan: Plan) -> None:
    matrices = sum(p.numel() for p in set(dense.parameters()) if p.dim() > 1)
    replaced = sum(layer.before.params for layer in plan.layers if layer.format is not None)
    left = sum(each.params for each in plan.coverage.left) if plan.coverage else 0
    _check(replaced + left == matrices, f"{ALL_SAID}: {replaced} + {left} != {matrices}")


def _counts(model: PreTrainedModel) -> None:
    said = tnlm.report(model).parameters_after
    held = sum(p.numel() for p in set(model.parameters()))
    _check(said == held, f"the report counts {said} parameters, the model has {held}")


def _reproducible(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    one, other = outputs(model, inputs), outputs(model, inputs)
    _check(bool(torch.isfinite(one).all()), "outputs are not finite")
    _check(torch.equal(one, other), "outputs differ between two passes")


def _loads(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    expected = outputs(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved"
        tnlm.save(model, path)
        for load in (tnlm.load, auto_class(model).from_pretrained):
            loaded = load(path).eval()
            _check(type(loaded) is type(model), f"{load.__qualname__} gives a {type(loaded)}")
            _check(_same(loaded, model), f"{load.__qualname__} gives other weights")
            # A file's tensors lie anywhere in memory, which rounds sums differently; not a copy's.
            same = torch.equal(outputs(copy.deepcopy(loaded), inputs), expected)
            _check(same, f"{load.__qualname__} gives other outputs")


def _same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _dense(copied: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    expected = outputs(model, inputs)
    error = (outputs(tnlm.to_dense(copied), inputs) - expected).norm() / expected.norm()
    _check(float(error) <= TOLERANCE, f"to_dense is off by {float(error):.1e}")


def _trains(dense: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    try:
        trained = _gradients(dense, inputs)
    except Exception:  # the family itself does not, in eval mode
        return False
    if not trained:
        return False
    found = _gradients(model, inputs)
    _check(bool(found), "no parameter gets a gradient")
    _check(all(bool(torch.isfinite(g).all()) for g in found), "gradients are not finite")
    return None


def _gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    caches = "use_cache" in inspect.signature(model.forward).parameters
    found = _first(model(**inputs, **({"use_cache": False} if caches else {})))
    if not found.requires_grad:
        return []
    found.float().square().mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _generates(dense: PreTrainedModel, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    def write(one: PreTrainedModel) -> Any:
        torch.manual_seed(0)
        given = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        return one.generate(**given, max_new_tokens=3, do_sample=False)

    if not model.can_generate():
        return False
    try:
        write(dense)
    except Exception:  # the family itself does not, with such a config or input
        return False
    _check(write(model) is not None, "nothing was generated")
    return None


def outputs(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a model makes of inputs; random numbers in it are those of a seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        return _first(model(**inputs)).float()


def _first(found: Any) -> Tensor:
    """Return the logits of an output, or else its first tensor of floating-point numbers."""
    logits = getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    values = found.to_tuple() if hasattr(found, "to_tuple") else tuple(found)
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return next(v for v in flat if isinstance(v, Tensor) and v.is_floating_point())


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
