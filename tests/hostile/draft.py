"""A copy of a sound checkpoint that is being broken: its config, its tensors, its bytes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ODD: list[Any] = [
    None, True, -1, 0, 1, 7, 1.5, 10**12, 10**30, 1e300, float("nan"), float("inf"), "", "x",
    "../x", "\ud800", [], [0], [-1], [[]], ["x"], {}, {"x": 1}, {"": None},
]  # fmt: skip
"""What may stand where JSON should hold something else."""

Tensors = dict[str, tuple[str, list[int], bytes]]
"""Tensor name to its dtype, shape and bytes, as a safetensors file holds them."""


@dataclass
class Draft:
    """A directory to be broken, and the generator that chooses where."""

    path: Path
    rng: random.Random

    @property
    def config_file(self) -> Path:
        return self.path / "config.json"

    def config(self) -> dict[str, Any]:
        return json.loads(self.config_file.read_text())

    def write(self, config: Any) -> None:
        self.config_file.write_text(json.dumps(config))

    def edit(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change what the config says of the compression."""
        config = self.config()
        change(config["quantization_config"])
        self.write(config)

    def entry(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change one entry, or one part of a fused one."""

        def one(stored: dict[str, Any]) -> None:
            entry = stored["modules"][self.rng.choice(list(stored["modules"]))]
            change(self.rng.choice(entry["parts"]) if "parts" in entry else entry)

        self.edit(one)

    def weights(self) -> Path:
        """Return one of the files that hold weights."""
        return self.rng.choice(sorted(self.path.glob("*.safetensors")))

    def rewrite(self, change: Callable[[Tensors], Any]) -> None:
        """Change the tensors of one file."""
        file = self.weights()
        tensors = unpack(file.read_bytes())
        change(tensors)
        file.write_bytes(pack(tensors))

    def tensors_of(self, file: Path) -> dict[str, Any]:
        return load_file(file)

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Change one file's header as JSON; what follows stays."""
        file = self.weights()
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def unpack(data: bytes) -> Tensors:
    """Return the tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: (one["dtype"], one["shape"], rest[slice(*one["data_offsets"])])
        for name, one in header.items()
    }


def pack(tensors: Tensors) -> bytes:
    """Return a safetensors file, right but for what the tensors are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(d for _, _, d in tensors.values())
