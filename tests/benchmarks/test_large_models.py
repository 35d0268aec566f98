"""Large models: memory is measured, costs are predicted."""

from __future__ import annotations


def test_large_models_stay_below_their_cap(run, tmp_path):
    sizes = "--hidden 64 --blocks 3 --vocabulary 64 --memory 4GB --scheme svd-llm --length 32"
    figures, text = run("large_models", tmp_path / "large", *sizes.split())
    assert 0 < figures["peak"] < 4e9
    assert len(figures["block"]) == 3
    block = 4 * 64**2 + 3 * 64 * 176 + 2 * 64
    assert figures["size"] == 4 * (2 * 64**2 + 64 + 3 * block)
    assert "| svd-llm | 0.00 GB | 4GB |" in text


def test_costs_of_large_models_grow_with_them(run):
    figures, text = run("cost_model", "--widths", 32, "--models", "7B", "400B mixture")
    dense, mixture = figures["rows"]
    assert dense["params"] == 6_738_149_376  # matrices and tables of Llama 2 7B, without norms
    assert 0 < dense["auto"]["peak"] < 2 * dense["params"]
    assert mixture["fit"] > dense["fit"] > 0
    assert mixture["gather"] / mixture["params"] < dense["gather"] / dense["params"]
    assert "| in memory | in memory |" in text
