"""Tables as targets: the weight of an embedding, with the output heads that share it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tnlm.checkpoint.entries import Entry, network_of
from tnlm.decompositions.base import Ceiling
from tnlm.layers.embedding import FactorizedHead
from tnlm.layers.packed import PackedEmbedding, PackedHead
from tnlm.layers.swap import Swap
from tnlm.metrics.measure import Measure
from tnlm.metrics.metric import Metric
from tnlm.plans.plan import LayerPlan
from tnlm.targets.base import Fitted, Member
from tnlm.targets.fit import fit_matrix
from tnlm.tensors.contraction import chain
from tnlm.tensors.costs import is_table, row_macs
from tnlm.tensors.network import Cost, Network


@dataclass(frozen=True)
class TableTarget(Member):
    """The weight of an embedding, ``(vocabulary, width)``.

    Attributes:
        tied: other modules that use the same weight (a tied output head).
    """

    tied: tuple[str, ...] = ()

    kind = "embedding"
    unmeasured = (
        "an embedding has no input to measure; use metric='tokens' or 'identity', or scheme 'rtn' "
        "or 'gptq'"
    )

    def unmeasured_by(self, measure: Measure) -> str:
        """Return why a metric cannot measure an embedding; empty for the frequencies of tokens."""
        return "" if measure.weighs_tokens else self.unmeasured

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Disable identity blocks, since rows of such a table could not be looked up."""
        return {"gauge": False}

    def bias(self, model: nn.Module) -> Tensor | None:
        """Return None, since a table has no bias."""
        return None

    def dense_cost(self, itemsize: int) -> Cost:
        """Return the cost of the table: only heads take multiply-adds, lookups do not."""
        heads = self.params * len(self.tied)
        return Cost(self.params, self.params * itemsize, self.met(heads))

    def cost(self, network: Network, itemsize: int, extra: int = 0) -> Cost:
        """Return the cost of the factors.

        A tied head applies the factors, or rebuilds the rows and multiplies by them.
        """
        lookup = row_macs(network)
        rebuilt = self.params + self.shape[0] * lookup
        head = rebuilt if is_table(network) else chain(network).macs
        size = network.params * itemsize + network.index_bytes
        return Cost(network.params, size, lookup + head * len(self.tied))

    def products(self, network: Network | None) -> Sequence[tuple[int, int] | Network]:
        """Return the products of tied heads, since a lookup takes hardly any time."""
        return list(super().products(network)) * len(self.tied)

    def packs(self, structure: str | None) -> bool:
        """Return whether the table stays whole: factors that are looked up are not packed."""
        return structure is None

    def packed_shapes(self, network: Network | None) -> Sequence[tuple[int, int]]:
        """Return the shape of the table."""
        return [self.shape]

    def budget(
        self, keep: float, max_macs: float, *, unit: str = "params", extra: int = 0
    ) -> Ceiling:
        """Return the limit on parameters; MACs are not limited, since a lookup costs little."""
        share = 1.0 if unit == "macs" else keep
        return Ceiling(min(math.floor(share * self.params + 1e-9), self.most) - extra)

    def most_macs(self, max_macs: float) -> float:
        """Return infinity, since a lookup costs little."""
        return math.inf

    def entry(self, layer: LayerPlan, *, biased: bool) -> Entry:
        """Return the checkpoint entry of the replaced table."""
        shape = list(self.shape)
        if layer.format is None:
            return {"kind": "table", "shape": shape, "bias": biased}
        spec = dict(layer.spec)
        return {
            "kind": "embedding",
            "shape": shape,
            "bias": biased,
            "format": layer.format,
            "options": spec,
        }

    def fit(
        self,
        model: nn.Module,
        layer: LayerPlan,
        metric: Metric,
        weight: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Fitted:
        """Fit the table as planned."""
        own = self.weight(model)
        entry = self.entry(layer, biased=False)
        wanted = own if weight is None else weight.to(own)
        if layer.format is None:
            return Fitted([(self, entry, nn.Embedding.from_pretrained(wanted.clone()))], 0.0)
        module, error = fit_matrix(entry, wanted, None, metric, layer)
        return Fitted([(self, entry, module)], error)

    def describe(
        self, model: nn.Module, group: Sequence[Member], entries: Mapping[str, Entry]
    ) -> tuple[dict[str, Entry], dict[str, str]]:
        """Return the checkpoint entries of the embedding and of its tied heads."""
        old: Any = model.get_submodule(self.module)
        entry = {**entries[self.name], "padding_idx": old.padding_idx}
        found, ties = {self.module: entry}, {}
        for head in self.tied:
            biased = getattr(model.get_submodule(head), "bias", None) is not None
            if entry["kind"] == "table":  # reads the codes of the table
                found[head] = {"kind": "packed-head", "shape": list(self.shape), "bias": biased}
                continue
            found[head] = {**entry, "kind": "head", "bias": biased}
            for factor in network_of(entry).factors:
                ties[f"{head}.{factor}"] = f"{self.module}.{factor}"
        return found, ties

    def install(
        self, model: nn.Module, swap: Swap, module: nn.Module, entries: Mapping[str, Entry]
    ) -> None:
        """Install the table, and heads that share its factors."""
        table: Any = module
        table.padding_idx = entries[self.module]["padding_idx"]
        for name in self.tied:
            old = model.get_submodule(name)
            bias: nn.Parameter | None = getattr(old, "bias", None)
            head = _head(table, bias)
            swap.replace(name, head.train(old.training))
        super().install(model, swap, module, entries)


def _head(table: Any, bias: nn.Parameter | None) -> nn.Module:
    """Return a head that shares what a table holds."""
    if isinstance(table, PackedEmbedding):
        return PackedHead(bias).share(table)
    head = FactorizedHead(table.network, bias=False, device="meta")
    for factor in table.network.factors:
        setattr(head, factor, getattr(table, factor))
    head.bias = bias
    return head


def heads_of(targets: Sequence[Member]) -> dict[str, tuple[str, ...]]:
    """Return the modules of the tables among targets, each with the heads that are tied to it."""
    return {each.module: each.tied for each in targets if isinstance(each, TableTarget)}
