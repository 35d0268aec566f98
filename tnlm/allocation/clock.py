"""The predicted time of targets, as the price of an allocation."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tnlm.errors import OptionError
from tnlm.layers.prices import Prices
from tnlm.layers.pricing import layer_time
from tnlm.targets.base import Target
from tnlm.tensors.network import Cost, Network

DEFAULTS = {"decode": 1, "prefill": 512}
"""The workloads: a step of decoding with a batch of sequences, and a pass over a prompt."""


@dataclass(frozen=True)
class Workload:
    """One forward pass whose time counts.

    Attributes:
        kind: ``"decode"`` or ``"prefill"``.
        tokens: sequences of a decoding step, or tokens of a prompt.
    """

    kind: str
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Workload:
        """Read ``"decode"``, ``"prefill"``, or one of them with a size.

        Raises:
            OptionError: if the text is anything else.

        Example:
            >>> Workload.parse("decode"), Workload.parse("prefill:128").tokens
            (Workload(kind='decode', tokens=1), 128)
        """
        kind, colon, size = text.partition(":") if isinstance(text, str) else ("", "", "")
        if kind in DEFAULTS and not colon:
            return cls(kind, DEFAULTS[kind])
        if kind not in DEFAULTS or not (size.isascii() and size.isdigit() and int(size) > 0):
            raise OptionError(
                f"workload={text!r}; allowed: decode, prefill, decode:SEQUENCES such as decode:8, "
                "or prefill:TOKENS such as prefill:128",
                argument="workload",
            )
        return cls(kind, int(size))

    def __str__(self) -> str:
        """Return the text that :meth:`parse` reads."""
        return f"{self.kind}:{self.tokens}"


@dataclass(frozen=True)
class Clock:
    """Predicts the time that targets take in a pass of a workload.

    Attributes:
        prices: times of a machine.
        workload: the pass.
        itemsize: bytes per element.
    """

    prices: Prices
    workload: Workload
    itemsize: int

    def timed(self, cost: Cost, target: Target, network: Network | None = None) -> Cost:
        """Return a cost with the predicted time of a target.

        Args:
            cost: its cost.
            target: the target.
            network: what replaces it; None if it stays dense.
        """
        # Of E experts, k of which take a token, this is the time of those that take any.
        tokens = self.workload.tokens * target.share
        each = max(1, round(tokens))
        products = target.products(network)
        made = network is not None
        seconds = sum(
            layer_time(product, self.prices.times, self.itemsize, each, arranged=made)
            for product in products
        )
        return replace(cost, time=round(1e9 * seconds * min(1.0, tokens)))

    def __str__(self) -> str:
        """Return the workload, and the machine for which times are predicted."""
        return f"{self.workload} on {self.prices.name}"
