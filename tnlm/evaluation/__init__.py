"""Measure models: perplexity and decoding speed."""

from __future__ import annotations

from tnlm.evaluation.perplexity import Perplexity, perplexity
from tnlm.evaluation.speed import decode_rates

__all__ = ["Perplexity", "decode_rates", "perplexity"]
