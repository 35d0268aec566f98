"""The server of transformers, for models whose decoding is compiled on any device."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cli import transformers as program
from transformers.cli.serving import model_manager

from tnlm.runtimes.compiled import compile_decoding


class CompilingManager(model_manager.ModelManager):
    """Loads models for the server, and lets their decoding be compiled."""

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return compile_decoding(super()._load_model(*args, **kwargs))


def main() -> None:
    """Run the command line of transformers."""
    model_manager.ModelManager = CompilingManager  # type: ignore[misc]
    program.main()


if __name__ == "__main__":
    main()
