"""How often tokens occur, and the inputs of heads that are tied to their embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens
from tnlm.calibration.opening import open_store
from tnlm.calibration.padding import Padding, padding_of
from tnlm.calibration.passes import run
from tnlm.calibration.statistics import check_finite, check_reached, counted_rows
from tnlm.calibration.store import Statistics
from tnlm.calibration.walk import eval_mode


def collect_tokens(
    model: PreTrainedModel,
    tables: Mapping[str, Sequence[str]],
    batches: Sequence[Batch],
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration data through a model, and return how often tokens occur.

    By name of each embedding, these are ``frequency`` ``(rows,)``, the fraction of lookups of each
    row, and ``moment`` ``(width, width)``, the mean second moment E[x x.T] of the inputs of its
    tied heads; the identity if it has none.

    Args:
        model: run in eval mode, without gradients; left unchanged.
        tables: names of the embeddings, with the heads that use the same weight.
        batches: from :func:`tnlm.calibration.data.token_batches`; padding is not counted.
        cache_dir: cache of the statistics.
        progress: show a progress bar.

    Raises:
        CalibrationError: if no embedding is reached, or an input of a head is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=4, n_layer=1, n_head=1))
        >>> batches = [{"input_ids": torch.tensor([[2, 2, 1, 2]])}]
        >>> found = collect_tokens(model, {"transformer.wte": []}, batches, progress=False)
        >>> found.tensor("transformer.wte", "frequency").tolist()
        [0.0, 0.25, 0.75, 0.0]
    """
    names = list(tables)
    store = open_store(cache_dir, count_tokens(batches), model, names, batches, "tokens")
    if store.complete:
        return store
    sums = {name: _Sums(model.get_submodule(name), name, heads) for name, heads in tables.items()}
    with eval_mode(model), torch.no_grad(), ExitStack() as hooks:
        for found in sums.values():
            hooks.enter_context(found.watching(model))
        for batch in tqdm(batches, desc="counting tokens", disable=not progress):
            padding = padding_of(batch)
            for found in sums.values():
                found.padding = padding
            run(model, batch)
    for name, found in sums.items():
        if found.lookups:
            store.put(name, [name], found.means())
    check_reached(store, names)
    store.save_index()
    return store


class _Sums:
    """The lookups of every row of one embedding, and the second moment of its heads' inputs."""

    def __init__(self, module: Any, name: str, heads: Sequence[str]) -> None:
        rows, width = module.weight.shape
        self.name, self.heads = name, heads
        self.padding: Padding | None = None
        self.lookups = self.reads = 0
        self.counts = torch.zeros(rows, dtype=torch.float64)
        self.square = torch.zeros(width, width, dtype=torch.float64)

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add up what the embedding and its heads are given in forward passes."""

        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            ids = counted_rows(self.name, given[0][..., None], self.padding)[:, 0]
            self.counts += torch.bincount(ids.cpu(), minlength=len(self.counts))
            self.lookups += len(ids)

        def read(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = counted_rows(self.name, given[0], self.padding).double().cpu()
            self.square += rows.T @ rows
            self.reads += len(rows)

        hooks = [model.get_submodule(self.name).register_forward_pre_hook(look)]
        hooks += [model.get_submodule(head).register_forward_pre_hook(read) for head in self.heads]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def means(self) -> dict[str, Tensor]:
        """Return the frequencies and the moment."""
        check_finite(f"inputs of the heads of {self.name}", {"moment": self.square})
        moment = self.square / self.reads if self.reads else torch.eye(len(self.square)).double()
        return {"frequency": self.counts / self.lookups, "moment": moment}
