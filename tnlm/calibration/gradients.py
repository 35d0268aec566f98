"""Statistics of gradients: second moments at matrices' outputs, and Fisher information."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tnlm.calibration.backward import stream
from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.loss import make_tasks
from tnlm.calibration.merging import merge, merged_counts
from tnlm.calibration.opening import open_store
from tnlm.calibration.padding import Padding
from tnlm.calibration.room import check_room
from tnlm.calibration.sequences import sequences_of
from tnlm.calibration.statistics import ROWS, check_finite, counted_rows, fill
from tnlm.calibration.store import Statistics
from tnlm.errors import CalibrationError, OptionError, did_you_mean
from tnlm.parallel.workers import ALONE, Workers
from tnlm.tensors.exact import rounded
from tnlm.tensors.symmetric import add_outer

logger = logging.getLogger("tnlm")

MOMENTS = ("full", "diagonal", "none")
"""Parts of the second moment of gradients that can be gathered."""


class _Gradients:
    """Sums over tokens and examples for the watched modules.

    Args:
        moment: one of `MOMENTS`.
        examples: number of sequences, one per batch, to gather the Fisher information; otherwise
            None.
        workers: share out the batches.
        slope: whether to gather the mean gradient of the weight.
    """

    def __init__(
        self, moment: str, examples: int | None, workers: Workers, slope: bool = False
    ) -> None:
        self.moment, self.examples, self._workers = moment, examples, workers
        self.slope = slope
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.zeros: list[str] = []
        self._rows: Counter[str] = Counter()
        self._example: dict[str, Tensor] = {}

    def see(self, name: str, x: Tensor, output: Tensor, padding: Padding | None) -> None:
        """Hook a module's output, to receive its gradient."""
        if not x.is_floating_point():
            raise CalibrationError(f"{name} has no vectors as inputs; ignore it")
        if name not in self.sums:
            rows, columns, device = output.shape[-1], x.shape[-1], output.device
            self.sums[name] = {}
            if self.moment != "none":
                shape = (rows, rows) if self.moment == "full" else (rows,)
                square = torch.zeros(shape, dtype=torch.float64, device=device)
                self.sums[name]["gradient"] = square
            if self.examples is not None:
                self.sums[name]["fisher"] = torch.zeros(rows, columns, device=device)
            if self.slope:
                total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
                self.sums[name]["slope"] = total
        self._rows[name] += output.shape[:-1].numel()
        needs_inputs = self.slope or self.examples is not None
        inputs = counted_rows(name, x, padding) if needs_inputs else None
        output.register_hook(partial(self._add, name, inputs, padding))

    def _add(
        self, name: str, inputs: Tensor | None, padding: Padding | None, gradient: Tensor
    ) -> None:
        rows = counted_rows(name, gradient, padding)
        for part in rows.split(ROWS) if self.moment != "none" else ():
            if self.moment == "full":
                add_outer(self.sums[name]["gradient"], part.float())
            else:
                squares = part.double().square().sum(0)
                self.sums[name]["gradient"] += rounded(squares, squares)
        if inputs is not None:  # a module may be called more than once
            weight = rows.float().T @ inputs.float()
            if self.slope:
                self.sums[name]["slope"] += weight
            if self.examples is not None:
                known = self._example.get(name)
                self._example[name] = weight if known is None else known + weight

    def end_batch(self) -> None:
        """Square the weights' gradients on the current sequence, and add them."""
        for name, gradient in self._example.items():
            self.sums[name]["fisher"] += gradient.square_()
        self._example.clear()

    def flush(self, store: Statistics) -> None:
        """Move all sums to a store, as means over tokens or examples, and reset them."""
        if self._workers.size > 1:
            merge(self.sums, self._workers)
            self._rows = Counter(merged_counts(self._rows, self._workers))
        for name, sums in self.sums.items():
            if not self._rows[name]:  # called, but with no token
                continue
            check_finite(f"gradients at {name}", sums)
            if not any(bool(total.any()) for total in sums.values()):
                self.zeros.append(name)
            counts = {"gradient": store.tokens, "fisher": self.examples or 1, "slope": store.tokens}
            if self.slope:
                sums["slope"] = sums["slope"].float()
            store.put(name, [name], {k: total.div_(counts[k]).cpu() for k, total in sums.items()})
        self.sums.clear()


def collect_gradients(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    *,
    moment: str = "full",
    fisher: bool = False,
    slope: bool = False,
    labels: str = "sampled",
    seed: int = 0,
    cache_dir: str | Path | None = None,
    progress: bool = True,
    workers: Workers = ALONE,
) -> Statistics:
    """Run calibration data forward and backward, and return statistics of gradients.

    The loss is the cross-entropy, summed over a sequence: of next tokens, or for a masked language
    model, of all tokens. With g its gradient at a module's output for one token, the statistics are

    - ``gradient`` G = E[g g.T], ``(out, out)``, float64, a mean over all tokens, or its diagonal
      E[g²], ``(out,)``;
    - ``fisher``, ``(out, in)``, float32, the mean over sequences of the weight's squared gradient;
    - ``slope``, ``(out, in)``, float32, the weight's gradient, a mean over all tokens.

    All cover a module's whole output; ``fisher`` and ``slope`` are ``(out, in)`` for GPT-2's
    ``(in, out)`` weights too.

    Args:
        model: run in eval mode, without gradients of parameters; left unchanged.
        modules: dotted names of the modules to watch; those that no token reaches get no
            statistics.
        batches: from :func:`tnlm.calibration.data.token_batches`; padding is not counted.
        moment: the part of ``gradient`` to gather: ``"full"``, ``"diagonal"`` or ``"none"``.
        fisher: whether to gather ``fisher``, which processes sequences one by one.
        slope: whether to gather ``slope``, which is 0 on average under sampled labels.
        labels: ``"sampled"`` from the model's predictions, for the true Fisher information, or
            ``"data"`` for the data's own tokens, for the empirical one.
        seed: seed of the samples, which do not depend on the batch size.
        cache_dir: cache of the statistics, under a hash of everything that they depend on.
        progress: show a progress bar.
        workers: share out the batches.

    Raises:
        CalibrationError: if the model has no output head, no module is reached, or a gradient is
            not finite.
        OptionError: if ``labels`` or ``moment`` is unknown, or there is nothing to gather.

    Source: G as in K-FAC (Martens and Grosse 2015, arXiv 1503.05671); the Fisher information as in
    FWSVD (Hsu et al. 2022, arXiv 2207.00112); sampled against data's labels: Kunstner et al. 2019,
    arXiv 1905.12558.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=4, n_layer=1, n_head=1))
        >>> batches = [{"input_ids": torch.arange(8).reshape(1, 8),
        ...             "attention_mask": torch.ones(1, 8, dtype=torch.int64)}]
        >>> name = "transformer.h.0.mlp.c_fc"
        >>> found = collect_gradients(model, [name], batches, fisher=True, progress=False)
        >>> found.tensor(name, "gradient").shape, found.tensor(name, "fisher").shape
        (torch.Size([16, 16]), torch.Size([16, 4]))
    """
    if moment not in MOMENTS:
        raise OptionError(f"moment={moment!r}{did_you_mean(str(moment), MOMENTS)}")
    if moment == "none" and not (fisher or slope):
        raise OptionError("moment='none' without fisher=True or slope=True leaves nothing")
    if moment == "full":
        check_room(model, modules)
    if fisher:
        batches = [sequence for batch in batches for sequence in sequences_of(batch)]
    tasks = make_tasks(model, batches, labels, seed)
    about = ("gradients", moment, fisher, labels, seed if labels == "sampled" else 0)
    kind = (*about, "slope") if slope else about
    store = open_store(cache_dir, count_tokens(batches), model, modules, batches, kind, workers)
    if store.complete:
        return store
    gradients = _Gradients(moment, len(batches) if fisher else None, workers, slope)
    shares = stream(model, modules, tasks, gradients.see, store.trail, workers)
    title = "computing gradients" if progress else None
    fill(store, gradients, shares, modules, len(tasks), title, workers)
    if gradients.zeros:
        logger.warning(
            "the gradients at %d of %d modules are exactly zero, first at %s: the loss does not "
            "depend on them",
            len(gradients.zeros),
            len(modules),
            gradients.zeros[0],
        )
    return store
