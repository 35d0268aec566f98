"""Linear maps take the place of sub-layers."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn

from tnlm.errors import BudgetError, TargetError
from tnlm.metrics.sides import Side


def test_linear_maps_of_sublayers_are_weighed_against_autos_choices(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    model = tiny_llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(word_text(512))
    options = "--num-samples 8 --window 32 --gradient-samples 2 --keep-targets 0.8 0.5"
    out = tmp_path / "rows.json"
    start(
        "linear_sublayers",
        *(str(tmp_path / "model"), "--calibration", str(tmp_path / "text.txt")),
        *(*options.split(), "--out", str(out)),
    )
    rows = json.loads(out.read_text())
    assert [row["keep_targets"] for row in rows] == [0.8, 0.5]
    assert all(0 < row["loss_with_maps"] <= row["loss"] * 1.001 for row in rows)


def linear_sublayers(tiny_llama, word_tokenizer, word_text, folder, *options, gate=None, **config):
    """Return the words of its command line for a tiny Llama, whose gates may be constants."""
    model = tiny_llama(num_hidden_layers=1, **config)
    if gate is not None:
        torch.nn.init.zeros_(model.model.layers[0].mlp.gate_proj.weight)
        torch.nn.init.constant_(model.model.layers[0].mlp.gate_proj.bias, gate)
    model.save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(word_text(512))
    words = ["linear_sublayers", folder / "model", "--calibration", folder / "text.txt"]
    words += ["--num-samples", 8, "--window", 32, "--gradient-samples", 2]
    return [*words, "--out", folder / "rows.json", "--keep-targets", *options]


def test_a_linear_sublayer_is_taken_as_a_map(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    made = (tiny_llama, word_tokenizer, word_text, tmp_path)
    start(*linear_sublayers(*made, 0.6, gate=2.0, mlp_bias=True))
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert "model.layers.0.mlp" in row["maps"]
    assert row["loss_with_maps"] < 0.9 * row["loss"]


def test_budgets_below_what_can_be_kept_are_refused_not_left_out(
    start, tiny_llama, word_tokenizer, word_text, tmp_path
):
    made = (tiny_llama, word_tokenizer, word_text, tmp_path)
    with pytest.raises(BudgetError):
        start(*linear_sublayers(*made, 0.8, 1e-9))


def test_linear_sublayers_refuses_models_whose_matrices_have_other_names(tiny_gpt2):
    module = importlib.import_module("linear_sublayers")
    with pytest.raises(TargetError, match=r"transformer\.h\.0\.mlp has no gate_proj"):
        module.moments_of(tiny_gpt2(), [])
    with pytest.raises(TargetError, match="no self_attn or mlp"):
        module.moments_of(nn.Linear(2, 2), [])


def test_the_moments_of_a_linear_sublayer_give_a_map_without_harm():
    module = importlib.import_module("linear_sublayers")
    gaussian = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 6, generator=gaussian) + 1.0
    first, last = nn.Linear(6, 6), nn.Linear(6, 4)
    moments = module.Moments()
    handles = moments.watch(first, last)
    first(inputs)
    last(torch.cat([inputs, inputs], 1)[:, 3:9])  # a linear map of the inputs
    harms = moments.harms(Side(torch.eye(4)))
    outputs = last(torch.cat([inputs, inputs], 1)[:, 3:9])
    for handle in handles:
        handle.remove()
    spread = outputs.detach().double().var(0, correction=0).sum()
    assert float(harms[0]) == pytest.approx(float(spread), rel=1e-3)
    assert float(harms[4]) < 1e-3 * float(spread)
    assert list(harms) == sorted(harms, reverse=True)
