"""Fused and split projections are compared."""

from __future__ import annotations

import re

import pytest


def test_fused_projections_make_no_difference_to_auto(
    start, tiny_llama, word_tokenizer, word_text, tmp_path, capsys
):
    tiny_llama(max_position_embeddings=512).save_pretrained(tmp_path / "m")
    word_tokenizer.save_pretrained(tmp_path / "m")
    text = tmp_path / "text.txt"
    text.write_text(word_text(1200, seed=1))
    start("fused", tmp_path / "m", text, text, "--length", 64, "--test-windows", 1)
    found = re.findall(r"(\w+): .* ratio ([\d.]+)", capsys.readouterr().out)
    (llama, plain), (phi, split) = found
    assert (llama, phi) == ("LlamaForCausalLM", "Phi3ForCausalLM")
    assert float(split) == pytest.approx(float(plain), abs=1e-3)
