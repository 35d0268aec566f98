"""DesignSpace: the choices of layers, matrices, ranks and formats in a model, and their costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from tnlm.api import compress
from tnlm.errors import OptionError, RankError, TargetError, did_you_mean
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.forms import (
    SCHEMES,
    check_form,
    options_of,
    published,
    shrinks,
    stored,
)
from tnlm.studies.design.matrices import choices, matrices
from tnlm.studies.design.rules import LayerSets, Rule
from tnlm.targets.base import Selector, Target
from tnlm.targets.matching import ALL_LINEAR
from tnlm.tensors.network import Cost
from tnlm.utils.checks import check_whole

COUNTS = ("stored", "published")


class DesignSpace:
    """All configurations of a model: which layers, which matrices in them, one rank, one format.

    The space only depends on shapes, so that a config is as good as a model.

    Args:
        source: a model, or a config, for which no weights are created.
        layers: indices of the layers that may be chosen; all if None.
        tensors: the choices within a layer: names of matrices, such as ``"q_proj"``, or a mapping
            from names to matrices that are chosen together. Every matrix alone if None.
        ranks: the ranks to choose from.
        formats: the formats to choose from: ``"tucker"``, ``"low-rank"``.
        rules: what every configuration must obey; :data:`tnlm.studies.design.INSIGHTS` are the
            rules of the paper.
        targets: which matrices to consider, as in :func:`tnlm.compress`.

    Attributes:
        depth: how many layers the model has.
        dense: the cost of the dense model.

    Raises:
        OptionError: if a name, layer or format is unknown, or there is nothing to choose from.
        RankError: if a rank makes no matrix smaller.
        TargetError: if the model has no numbered layers with matrices, or several stacks of layers.

    Source: Moar, Tahmasebi, Pellauer and Kwon 2024, arXiv 2405.06626.

    Example:
        >>> from transformers import LlamaConfig
        >>> space = DesignSpace(LlamaConfig())  # the sizes of Llama-2-7B
        >>> space.count() == 2**39
        True
        >>> two = Configuration((2, 29), tuple(space.tensors))
        >>> round(space.percent(two, "published"), 6)
        6.004292
    """

    def __init__(
        self,
        source: PreTrainedModel | PreTrainedConfig,
        *,
        layers: Sequence[int] | None = None,
        tensors: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        ranks: Sequence[int] = (1,),
        formats: Sequence[str] = ("tucker",),
        rules: Sequence[Rule] = (),
        targets: Selector = ALL_LINEAR,
    ) -> None:
        """Check the choices against the model's shapes."""
        found = matrices(source, targets)
        self._matrices, self._itemsize = found.layers, found.itemsize
        self.dense = found.cost
        self.depth = max(found.layers) + 1
        self.tensors = choices(tensors, found.names)
        self.ranks, self.formats, self.rules = tuple(ranks), tuple(formats), tuple(rules)
        self.layers = tuple(found.layers) if layers is None else tuple(sorted(set(layers)))
        for layer in self.layers:
            if layer not in found.layers:
                raise OptionError(f"layer {layer}; the model has {_span(tuple(found.layers))}")
        self.sets = LayerSets.under(self.rules, self.layers, self.depth)
        self.whole = any(rule.kind == "all-tensors" for rule in self.rules)
        self._check_choices()

    def count(self, *, distinct: bool = False) -> int:
        """Return how many configurations there are.

        Args:
            distinct: count all configurations that decompose nothing as one. Otherwise the count
                is sets of layers times sets of matrices, including empty sets, as in papers.

        Notes:
            For Llama-2-7B, version 2 of arXiv 2405.06626 gives 2^39: 2^32 sets of layers times 2^7
            sets of matrices, at one rank. Version 1 gives 2^37 without a derivation; we read it as
            five choices per layer: four in attention, and the feed-forward matrices together.

        Example:
            >>> from transformers import LlamaConfig
            >>> five = {name: [name] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
            >>> five["mlp"] = ["gate_proj", "up_proj", "down_proj"]
            >>> DesignSpace(LlamaConfig(), tensors=five).count() == 2**37
            True
        """
        kinds = len(self.ranks) * len(self.formats)
        masks = 1 if self.whole else 2 ** len(self.tensors)
        if not distinct:
            return self.sets.count * masks * kinds
        return (self.sets.count - 1) * max(masks - 1, 1) * kinds + 1

    def configurations(self) -> Iterator[Configuration]:
        """Yield every distinct configuration: the dense one, then others by number of layers."""
        yield DENSE
        names = tuple(self.tensors)
        sizes = (len(names),) if self.whole else range(1, len(names) + 1)
        for layers in self.sets:
            for size in sizes:
                for tensors in combinations(names, size):
                    for form in self.formats:
                        for rank in self.ranks:
                            yield Configuration(layers, tensors, rank, form)

    def all_tensors(
        self, layers: Sequence[int], rank: int | None = None, form: str | None = None
    ) -> Configuration:
        """Return the configuration that decomposes every matrix of some layers.

        Args:
            layers: layer indices.
            rank: the rank; the first of the space if None.
            form: the format; the first of the space if None.
        """
        return Configuration(
            tuple(sorted(set(layers))),
            tuple(self.tensors),
            self.ranks[0] if rank is None else rank,
            self.formats[0] if form is None else form,
        )

    def broken(self, configuration: Configuration) -> str | None:
        """Return why a configuration is not in the space, or None if it is."""
        if configuration.is_dense:
            return None
        left = self.sets.thin(configuration.layers)
        if left != configuration.layers:
            lost = [layer for layer in configuration.layers if layer not in left]
            return f"layers {lost} are out of order, not in the space, or break its rules"
        if [name for name in self.tensors if name in configuration.tensors] != list(
            configuration.tensors
        ):
            return f"tensors {list(configuration.tensors)} are not, in order, of {[*self.tensors]}"
        if self.whole and len(configuration.tensors) < len(self.tensors):
            return f"rule 'all-tensors' requires {[*self.tensors]}"
        if configuration.rank not in self.ranks or configuration.format not in self.formats:
            return f"allowed: ranks {list(self.ranks)}, formats {list(self.formats)}"
        return None

    def matrices(self) -> list[Target]:
        """Return every matrix that a configuration may decompose."""
        names = {member for members in self.tensors.values() for member in members}
        layers = [self._matrices[layer] for layer in self.layers]
        return [target for layer in layers for name, target in layer.items() if name in names]

    def targets(self, configuration: Configuration) -> list[Target]:
        """Return the matrices that a configuration decomposes, without those it would not shrink.

        Rules are ignored here, so that other schedules can be priced and measured, too.

        Raises:
            OptionError: if the model lacks a layer, or the space lacks a tensor or the format.
        """
        if configuration.is_dense:
            return []
        check_form(configuration.format)
        for name in configuration.tensors:
            if name not in self.tensors:
                raise OptionError(f"unknown tensor {name!r}{did_you_mean(name, self.tensors)}")
        for layer in configuration.layers:
            if layer not in self._matrices:
                raise OptionError(f"layer {layer}; the model has {_span(tuple(self._matrices))}")
        wanted = {name for choice in configuration.tensors for name in self.tensors[choice]}
        return [
            target
            for layer in configuration.layers
            for name, target in self._matrices[layer].items()
            if name in wanted and shrinks(configuration.format, target, configuration.rank)
        ]

    def cost(self, configuration: Configuration) -> Cost:
        """Return the cost of the whole model under a configuration, as the library stores it."""
        found, rank = self.dense, configuration.rank
        for target in self.targets(configuration):
            after = stored(configuration.format, target, rank, self._itemsize)
            found = Cost(
                found.params - target.params + after.params,
                found.bytes - target.params * self._itemsize + after.bytes,
                found.macs - target.dense_cost(1).macs + after.macs,
            )
        return found

    def percent(self, configuration: Configuration, count: str = "stored") -> float:
        """Return the percentage of the model's parameters that a configuration removes.

        Args:
            configuration: what is decomposed.
            count: ``"stored"``: what the library stores; or ``"published"``: what papers count,
                r(in + out) parameters for a matrix of rank r, and r x r more for a Tucker core.

        Raises:
            OptionError: if the count is unknown, or the configuration does not fit the model.
        """
        if count not in COUNTS:
            raise OptionError(f"count={count!r}{did_you_mean(count, COUNTS)}")
        if count == "stored":
            left = self.cost(configuration).params
            return 100 * (self.dense.params - left) / self.dense.params
        form, rank = configuration.format, configuration.rank
        removed = sum(t.params - published(form, t, rank) for t in self.targets(configuration))
        return 100 * removed / self.dense.params

    def compress(
        self, model: PreTrainedModel, configuration: Configuration, *, progress: bool = True
    ) -> PreTrainedModel:
        """Compress a model in place as a configuration says, and return it.

        Raises:
            TargetError: if the configuration decomposes nothing, or does not fit the model.
            TnlmError: other subclasses, as :func:`tnlm.compress` does.
        """
        names = [target.name for target in self.targets(configuration)]
        if not names:
            raise TargetError(f"the configuration decomposes no matrix: {configuration}")
        options = options_of(configuration.format, configuration.rank)
        scheme = SCHEMES[configuration.format]
        return compress(model, scheme, targets=names, progress=progress, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the space and the shapes that it depends on as plain JSON values."""
        shapes = {n: {k: list(t.shape) for k, t in m.items()} for n, m in self._matrices.items()}
        return {
            "layers": list(self.layers),
            "tensors": {name: list(members) for name, members in self.tensors.items()},
            "ranks": list(self.ranks),
            "formats": list(self.formats),
            "rules": [rule.to_dict() for rule in self.rules],
            "shapes": {str(number): layer for number, layer in shapes.items()},
            "parameters": self.dense.params,
        }

    def _check_choices(self) -> None:
        if not (self.layers and self.ranks and self.formats):
            raise OptionError(
                f"layers={self.layers}, ranks={self.ranks}, formats={self.formats}; "
                "each needs at least one choice"
            )
        for form in self.formats:
            check_form(form)
            for rank in self.ranks:
                check_whole("rank", rank, error=RankError)
                if not self.targets(self.all_tensors(self.layers, rank, form)):
                    raise RankError(f"rank={rank} in format {form!r} makes no matrix smaller")


def _span(layers: tuple[int, ...]) -> str:
    return f"layers {layers[0]} to {layers[-1]}"
