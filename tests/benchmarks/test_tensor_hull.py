"""Structures are weighed against low rank, block by block."""

from __future__ import annotations

import importlib

from tnlm.metrics.metric import InputMoment


def test_the_hull_of_a_block_takes_a_structure_where_it_harms_less():
    module = importlib.import_module("tensor_hull_table")
    assert module.hull([(4, 0.0), (1, 9.0), (2, 5.0), (3, 4.0)]) == [(1, 9.0), (2, 5.0), (4, 0.0)]
    assert module.together([[(1, 9.0), (2, 5.0)], [(1, 3.0), (2, 0.0)]])[1:] == [(3, 8.0), (4, 5.0)]
    named = {"target": "layers.5.q", "members": ["layers.5.q"], "size": 10, "energy": 8.0}
    low = {**named, "structure": "low-rank", "share": 0.0, "curve": [[1, 8.0], [5, 4.0]]}
    fit = {"target": "layers.5.q", "structure": "kron", "share": 0.5, "params": 5, "harm": 3.0}
    assert module.least_harm([low, fit], None, 0.5) == 4.0
    assert module.least_harm([low, fit], "kron", 0.5) == 3.0
    assert "| kron | 0.75, 0.75 |" in list(module.tables([low, fit]))


def test_rounds_of_a_hybrid_never_raise_its_harm(gaussian, monkeypatch):
    module = importlib.import_module("tensor_hull")
    weight = gaussian(12, 8)
    harms = []
    for rounds in (1, 2, 4):
        monkeypatch.setattr(module, "ROUNDS", rounds)
        fit = module.hybrid(weight, weighted_inputs(gaussian), 70)
        assert fit["params"] <= 70
        assert fit["macs"] <= 96
        harms.append(fit["harm"])
    assert harms == sorted(harms, reverse=True)


def weighted_inputs(gaussian):
    root = gaussian(8, 8, seed=1)
    return InputMoment(root.T @ root)
