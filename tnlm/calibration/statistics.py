"""Streaming second moments of the inputs of matrices, and the store they are kept in."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from tnlm.calibration.data import Batch, count_tokens, fingerprint
from tnlm.calibration.metrics import InputMoment
from tnlm.calibration.walk import stream
from tnlm.errors import CalibrationError

logger = logging.getLogger("tnlm")

IN_MEMORY = 2**25
"""Bytes of moments held in memory; further ones go to files and are read when needed."""

ROWS = 1024
"""Tokens multiplied at once: products in the model's precision, sums in float64."""


_ABOUT_FILES = ("_name_or_path", "architectures", "dtype", "transformers_version")
"""What a config says about where a model comes from, not what it computes."""


class Statistics:
    """Second moments C = E[x x.T] of the inputs of modules, shared where modules share an input.

    Args:
        directory: where moments are kept as files; a temporary one is made when memory is short.
        tokens: how many tokens were seen.
    """

    def __init__(self, directory: Path | None = None, tokens: int = 0) -> None:
        """Start with no moments."""
        self.tokens = tokens
        self.leaders: dict[str, str] = {}
        self._directory = directory
        self._memory: dict[str, Tensor] = {}
        self._latest: tuple[str, InputMoment] | None = None

    def put(self, leader: str, members: Iterable[str], moment: Tensor) -> None:
        """Keep the moment of an input under its leader, for all modules that share the input."""
        self.leaders.update(dict.fromkeys(members, leader))
        held = sum(tensor.nbytes for tensor in self._memory.values())
        if self._directory is None and held + moment.nbytes <= IN_MEMORY:
            self._memory[leader] = moment
            return
        save_file({"moment": moment}, self._file(leader))

    def moment(self, module: str) -> Tensor:
        """Return the second moment ``(in, in)`` of a module's input, float64."""
        leader = self.leaders[module]
        if leader in self._memory:
            return self._memory[leader]
        return load_file(self._file(leader))["moment"]

    def metric(self, module: str) -> InputMoment:
        """Return the metric of a module's input; the latest one is kept, with its square root."""
        leader = self.leaders[module]
        if self._latest is None or self._latest[0] != leader:
            self._latest = None  # free the last one before the next is read
            self._latest = leader, InputMoment(self.moment(module))
        return self._latest[1]

    def forget(self) -> None:
        """Drop the latest metric from memory."""
        self._latest = None

    def _file(self, leader: str) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="tnlm-"))
            weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
        return self._directory / f"{leader}.safetensors"

    def save_index(self) -> None:
        """Write which module shares whose moment; marks a cache directory as complete."""
        index = {"tokens": self.tokens, "leaders": self.leaders}
        if self._directory is not None:
            (self._directory / "index.json").write_text(json.dumps(index, indent=1))

    @classmethod
    def read(cls, directory: Path) -> Statistics | None:
        """Return the statistics of a complete cache directory, or None."""
        try:
            index = json.loads((directory / "index.json").read_text())
            found = cls(directory, index["tokens"])
            found.leaders = index["leaders"]
        except (FileNotFoundError, ValueError, LookupError, TypeError):
            return None  # never finished, or not ours
        return found


class _Accumulator:
    """Sums x x.T over tokens for the watched modules, once for modules that share an input."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.leaders: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def see(self, name: str, x: Tensor, mask: Tensor | None) -> None:
        """Add the input of a module; ``mask`` is (sequences, length), or None when all count."""
        if self._last is not None and self._last[1] is x:
            self.leaders.setdefault(name, self._last[0])
        self._last = (self.leaders.setdefault(name, name), x)
        if self.leaders[name] != name:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        if mask is not None and x.shape[:-1] != mask.shape[:1]:  # a pooler sees no padding
            rows = rows[_mask_for(name, x, mask)]
        total = self.sums.get(name)
        if total is None:
            size = x.shape[-1]
            total = self.sums[name] = torch.zeros(size, size, dtype=torch.float64, device=x.device)
        for part in rows.split(ROWS):
            part = part.float()
            total += part.T @ part

    def flush(self, store: Statistics, tokens: int) -> None:
        """Move all sums to a store, as means over tokens, and forget them."""
        self._last = None
        for leader, total in self.sums.items():
            members = [name for name, other in self.leaders.items() if other == leader]
            if not bool(total.isfinite().all()):
                raise CalibrationError(
                    f"the inputs of {leader} are not finite on the calibration data; check the "
                    "model's weights and dtype"
                )
            store.put(leader, members, (total / tokens).cpu())
        self.sums.clear()


def _mask_for(name: str, x: Tensor, mask: Tensor) -> Tensor:
    if x.shape[:-1].numel() != mask.numel():
        raise CalibrationError(
            f"padding cannot be matched with the inputs of {name}, of shape {tuple(x.shape)}; use "
            "sequences of one length without padding"
        )
    return mask.reshape(-1).bool().to(x.device)


def collect(
    model: PreTrainedModel,
    modules: Sequence[str],
    batches: Sequence[Batch],
    *,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Statistics:
    """Run calibration data through a model and return the second moments of modules' inputs.

    Args:
        model: run in eval mode, without gradients; left as it was.
        modules: dotted names of the modules watched.
        batches: from :func:`tnlm.calibration.data.token_batches`; padding is not counted.
        cache_dir: keep the moments there, under a hash of weights, modules and data, and use them
            again when the hash is the same.
        progress: show a progress bar.

    Raises:
        CalibrationError: if a module is never reached, or an input is not finite.
    """
    tokens = count_tokens(batches)
    folder = None
    if cache_dir is not None:
        folder = Path(cache_dir) / _content_hash(model, modules, batches)
        cached = Statistics.read(folder)
        if cached is not None:
            logger.info("statistics of %d tokens read from the cache", cached.tokens)
            return cached
        folder.mkdir(parents=True, exist_ok=True)
    store = Statistics(folder, tokens)
    accumulator = _Accumulator()
    done = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with tqdm(total=1.0, desc="calibrating", bar_format=done, disable=not progress) as bar:
        for share in stream(model, modules, batches, accumulator.see):
            bar.update(min(share / len(batches), 1.0 - bar.n))
            if share == 0:  # a block is done: its moments are complete
                accumulator.flush(store, tokens)
    accumulator.flush(store, tokens)
    missing = [name for name in modules if name not in store.leaders]
    if missing:
        raise CalibrationError(
            f"the calibration data never reached {', '.join(missing[:3])}; ignore them"
        )
    store.save_index()
    widest = max(_width(model.get_submodule(name)) for name in modules)
    if tokens < widest:
        logger.warning(
            "%d calibration tokens for matrices of up to %d columns: directions never seen are "
            "damped; use more text for a better fit",
            tokens,
            widest,
        )
    return store


def _width(module: nn.Module) -> int:
    return int(getattr(module, "in_features", 0) or getattr(module, "nx", 0))


def _content_hash(model: PreTrainedModel, modules: Sequence[str], batches: Sequence[Batch]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _ABOUT_FILES}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    digest.update("\n".join(modules).encode())
    digest.update(fingerprint(batches).encode())
    return digest.hexdigest()
