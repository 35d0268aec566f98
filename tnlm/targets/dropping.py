"""Routed experts as targets: some experts of a block, and their router rows, are dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry
from tnlm.checkpoint.transformers_plugin import config_of
from tnlm.decompositions import get_format
from tnlm.decompositions.base import Ceiling, from_dict
from tnlm.layers.rows import row_tensors, with_rows
from tnlm.layers.swap import Swap
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Member, Target
from tnlm.targets.routing import Mixture, find_mixture, stacks_of_experts
from tnlm.tensors.network import Cost, Network

ROWS = "rows"
"""Kind of the entries of modules that lost rows."""


@dataclass(frozen=True)
class ExpertsTarget(Member):
    """The routed experts of one block, as a matrix ``(experts, 1)`` with a row per expert.

    Attributes:
        each: number of parameters of one expert, with its rows in the router.
        mixture: the block with its router, once a trial has shown that experts can be dropped.
    """

    each: int = 0
    mixture: Mixture | None = None

    kind = "experts"

    @property
    def params(self) -> int:
        """Number of parameters of all experts, with the router's rows if it is known."""
        return self.shape[0] * self.each

    @property
    def least(self) -> int:
        """Fewest experts that must stay: as many as are active for a token."""
        return 1 if self.mixture is None else self.mixture.active

    def tried(self, model: nn.Module) -> Member | str:
        """Return the target with its router, or why no expert can be dropped."""
        found = find_mixture(model, self.module, self.shape[0])
        if isinstance(found, str):
            return f"no expert can be dropped: {found}"
        known = replace(self, mixture=found, share=found.active / found.count)
        rows = sum(parameter.numel() for parameter in known._rows(model))
        return replace(known, each=self.each + rows // found.count)

    def held(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the tensors of all experts, and those of the router if it is known."""
        experts = list(model.get_submodule(self.module).parameters())
        return experts if self.mixture is None else experts + self._rows(model)

    def values(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the same tensors, all of which are the target's own."""
        return self.held(model)

    def _rows(self, model: nn.Module) -> list[nn.Parameter]:
        """Return the router's parameters that have one row per expert."""
        router = model.get_submodule(self._router)
        return [p for p in router.parameters() if len(p) == self.shape[0]]

    def weight(self, model: nn.Module) -> Tensor:
        """Return ones, one per expert, in the experts' dtype."""
        return torch.ones_like(self.held(model)[0].detach().view(self.shape[0], -1)[:, :1])

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since biases belong to the experts."""
        return None

    def dense_cost(self, itemsize: int) -> Cost:
        """Return the cost of all experts; MACs count only the active ones."""
        return Cost(self.params, self.params * itemsize, self.met(self.params))

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of the kept experts; as many are active for a token as before."""
        params = network.shape[0] * self.each
        return Cost(params, params * itemsize, self.met(self.params))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return nothing, since a token meets as many experts as before."""
        return []

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the largest and smallest number of experts; dropping them saves no MACs."""
        share = keep if unit != "macs" else float(keep >= 1)
        most = min(int(share * self.shape[0] + 1e-9), self.shape[0] - 1)
        return Ceiling(most, least=self.least)

    def entry(self, layer: LayerPlan, *, biased: bool) -> Entry:
        """Return the checkpoint entry of the experts, without the indices of those kept."""
        return {"kind": ROWS, "rows": self.shape[0]}

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Choose the experts to keep, and remove the others."""
        whole = self.weight(model)
        structure = get_format(str(layer.format))
        spec = from_dict(structure.spec, layer.spec)
        factors = structure.fit(whole, metric, spec)
        error = metric.relative(whole, structure.reconstruct(self.shape, spec, factors))
        entry = self.entry(layer, biased=False) | {"kept": factors["kept"].tolist()}
        entry, module = _cut(entry, model.get_submodule(self.module))
        return Fitted([(self, entry, module)], error)

    def describe(
        self, model: nn.Module, group: Sequence[Member], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the checkpoint entries of the experts and of their router."""
        router = _cut(entries[self.name], model.get_submodule(self._router))[0]
        return {self.module: entries[self.name], self._router: router}, {}

    @property
    def _router(self) -> str:
        if self.mixture is None:
            raise ValueError(f"the router of {self.name} is unknown; call tried() first")
        return f"{self.mixture.block}.{self.mixture.router}"

    def install(
        self, model: nn.Module, swap: Swap, module: nn.Module, entries: Mapping[str, Entry]
    ) -> None:
        """Install the kept experts, and a router with only their rows."""
        router = _cut(entries[self._router], model.get_submodule(self._router))[1]
        swap.replace(self.module, module)
        swap.replace(self._router, router)


def _cut(entry: Entry, module: nn.Module) -> tuple[Entry, nn.Module]:
    """Return the checkpoint entry of a module with fewer rows, and the module."""
    names = row_tensors(module, entry["rows"])
    cut = with_rows(module, names, entry["rows"], torch.tensor(entry["kept"]))
    return {**entry, "tensors": names}, cut


def droppable(model: nn.Module) -> Iterator[ExpertsTarget]:
    """Yield the routed experts of every block that stores them as 3-D parameters.

    Example:
        >>> from transformers import MixtralConfig, MixtralForCausalLM
        >>> tiny = MixtralConfig(vocab_size=8, hidden_size=4, intermediate_size=8,
        ...                      num_hidden_layers=1, num_attention_heads=1,
        ...                      num_key_value_heads=1, num_local_experts=4)
        >>> [(target.shape, target.params) for target in droppable(MixtralForCausalLM(tiny))]
        [((4, 1), 384)]
    """
    for name, count in stacks_of_experts(model):
        if name in dropped(model):
            continue
        params = sum(p.numel() for p in model.get_submodule(name).parameters())
        yield ExpertsTarget(name, name, (count, 1), each=params // count)


def dropped(model: nn.Module) -> dict[str, Entry]:
    """Return the entries of the modules that lost experts, or their rows, in an earlier call."""
    config = config_of(model)
    entries = {} if config is None else config.modules
    return {name: entry for name, entry in entries.items() if entry["kind"] == ROWS}


def only_dropped(model: nn.Module) -> bool:
    """Return whether a compressed model has lost experts and is dense otherwise."""
    config = config_of(model)
    return config is not None and len(dropped(model)) == len(config.modules)


def mixtures_among(targets: Sequence[Target]) -> list[Mixture]:
    """Return the mixtures of experts among targets."""
    return [t.mixture for t in targets if isinstance(t, ExpertsTarget) and t.mixture is not None]
