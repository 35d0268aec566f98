from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tnlm.calibration import statistics, store
from tnlm.calibration.data import count_tokens, token_batches
from tnlm.calibration.statistics import collect
from tnlm.errors import CalibrationError
from tnlm.targets.selection import select

IDS = torch.arange(160) % 61 + 3
BATCHES = token_batches(IDS, max_length=32)
RAGGED = token_batches([[3, 4, 5, 6], [7, 8, 9], [10, 11]], batch_size=3)
UP = "model.layers.1.mlp.up_proj"


def modules_of(model):
    return list(dict.fromkeys(target.module for target in select(model).targets))


def gather(model, batches=BATCHES, modules=None, **arguments):
    return collect(model, modules or modules_of(model), batches, progress=False, **arguments)


def moments(found):
    return {name: found.moment(name) for name in found.leaders}


def rows_of(model, name, batches=BATCHES):
    """All inputs at once, padding left out, in float64."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    times = len(seen) // len(batches)
    masks = [batch["attention_mask"].bool() for batch in batches for _ in range(times)]
    # A pooler sees one row for a sequence; all others see one for a token.
    shown = [x[mask] if x.ndim == 3 else x for x, mask in zip(seen, masks, strict=True)]
    return torch.cat(shown).double()


def direct(model, name, batches=BATCHES):
    """The second moment from all inputs at once."""
    rows = rows_of(model, name, batches)
    return rows.T @ rows / len(rows)


def assert_close(moment, expected):
    """Products are in float32, so errors are relative to the largest entries."""
    scale = float(expected.abs().max())
    torch.testing.assert_close(moment, expected, rtol=1e-5, atol=1e-6 * scale)


def swap(model, name, module):
    model.set_submodule(name, module)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_moments_equal_a_direct_computation(kind, batches, make_model):
    model = make_model(kind)
    found = gather(model, batches)
    assert found.tokens == count_tokens(batches)
    for name in modules_of(model):
        moment = found.moment(name)
        assert moment.dtype == torch.float64
        assert_close(moment, direct(model, name, batches))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_means_and_magnitudes_equal_a_direct_computation(kind, batches, make_model):
    model = make_model(kind)
    found = gather(model, batches)
    for name in modules_of(model):
        rows = rows_of(model, name, batches)
        for which, expected in (("mean", rows.sum(0)), ("magnitude", rows.abs().sum(0))):
            tensor = found.tensor(name, which)
            assert tensor.dtype == torch.float64
            assert_close(tensor, expected / len(rows))
    assert torch.equal(found.moment(name), found.tensor(name, "moment"))


def test_a_covariance_is_one_where_inputs_are_fewer_than_tokens(make_model):
    model = make_model("bert")  # its pooler has one input a sequence
    found = gather(model, RAGGED)
    for name in modules_of(model):
        mean = found.tensor(name, "mean")
        covariance = found.moment(name) - torch.outer(mean, mean)
        assert float(torch.linalg.eigvalsh(covariance)[0]) > -1e-6  # products are in float32
        rows = rows_of(model, name, RAGGED).double()
        assert_close(covariance, torch.cov(rows.T, correction=0))


def test_long_inputs_are_summed_in_parts(make_model, monkeypatch):
    expected = gather(make_model("llama"))
    monkeypatch.setattr(statistics, "ROWS", 5)
    found = gather(make_model("llama"))
    for name in found.leaders:
        for which in ("moment", "mean", "magnitude"):
            assert_close(found.tensor(name, which), expected.tensor(name, which))


def test_statistics_may_enter_graphs(make_model):
    found = gather(make_model("llama"))
    assert not any(found.moment(name).is_inference() for name in found.leaders)


def test_what_was_not_gathered_is_named(make_model, tmp_path):
    for folder in (None, tmp_path):
        found = gather(make_model("llama"), modules=[UP], cache_dir=folder)
        with pytest.raises(CalibrationError, match=r"'fisher' of .*up_proj was not gathered, only"):
            found.tensor(UP, "fisher")
        with pytest.raises(CalibrationError, match="no statistics of lm_head were gathered"):
            found.moment("lm_head")


def test_a_module_that_blocks_share_is_counted_in_each(make_model):
    model = make_model("llama")
    for layer in model.model.layers:
        layer.mlp = model.model.layers[0].mlp
    name = "model.layers.0.mlp.up_proj"
    assert_close(gather(model, modules=[name]).moment(name), direct(model, name))


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
def test_modules_with_one_input_share_one_moment(batches, make_model):
    found = gather(make_model("llama"), batches)
    for layer in range(2):
        groups = [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)]
        names = [
            [n for n in found.leaders if f"layers.{layer}." in n and n.split(".")[-1][:-5] in group]
            for group in groups
        ]
        leaders = [{found.leaders[name] for name in group} for group in names]
        assert [len(group) for group in names] == [3, 1, 2, 1]
        assert all(len(group) == 1 for group in leaders)
        assert len(set.union(*leaders)) == 4
    assert len(set(found.leaders.values())) == 8


def test_the_latest_metric_is_kept_for_those_that_share_it(make_model):
    found = gather(make_model("llama"))
    query, key = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    assert found.metric(query) is found.metric(key)
    assert found.metric(UP) is not found.metric(query)


def test_moments_move_to_files_when_memory_is_short(make_model, monkeypatch):
    expected = moments(gather(make_model("llama")))
    monkeypatch.setattr(store, "IN_MEMORY", 3 * (33 * 16 * 4 + (3 * 32 + 1) * 8))
    found = gather(make_model("llama"))
    assert len(found._memory) == 3
    assert moments(found).keys() == expected.keys()
    for name, moment in moments(found).items():
        assert torch.equal(moment, expected[name])


def test_bfloat16_models_have_moments_in_float64(make_model):
    model = make_model("llama").to(torch.bfloat16)
    moment = gather(model, modules=[UP]).moment(UP)
    assert moment.dtype == torch.float64
    assert_close(moment, direct(model, UP))


# Bad and thin data


def test_modules_never_reached_are_left_out(make_model):
    model, name = make_model("bert"), "encoder.layer.0.output.dense"
    model.spare = nn.Linear(4, 4)
    assert set(gather(model, modules=[name, "spare"]).leaders) == {name}
    with pytest.raises(CalibrationError, match="reached none of the modules, such as spare"):
        gather(model, modules=["spare"])


@pytest.mark.parametrize("batches", [BATCHES, RAGGED], ids=["walk", "padded"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_named(bad, batches, make_model):
    model = make_model("llama").train()
    model.model.layers[1].input_layernorm.weight.data[0] = bad
    with pytest.raises(CalibrationError, match=r"inputs of model\.layers\.1\.self_attn\.q_proj"):
        gather(model, batches)
    assert model.training
    assert not torch.is_inference_mode_enabled()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_few_tokens_warn_and_give_finite_metrics(make_model, caplog):
    batches = token_batches([[3, 4, 5]])
    found = gather(make_model("llama"), batches)
    assert "3 calibration tokens for matrices of up to 48 columns" in caplog.text
    for name in found.leaders:
        assert found.metric(name).inputs.root.isfinite().all()
        assert float(torch.linalg.eigvalsh(found.metric(name).inputs.values)[0]) > 0


def test_enough_tokens_do_not_warn(make_model, caplog):
    caplog.set_level(logging.INFO, logger="tnlm")
    gather(make_model("llama"))
    assert caplog.text == ""


def test_inputs_that_are_all_zero_stay_finite(make_model):
    model = make_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data.zero_()
    found = gather(model)
    assert not found.moment(UP).any()
    metric, weight = found.metric(UP), model.get_submodule(UP).weight
    assert torch.equal(metric.inputs.values, torch.eye(32, dtype=torch.float64))
    assert metric.relative(weight, 0 * weight) == 1.0


def test_padding_that_cannot_be_matched_is_an_error(make_model):
    class Pool(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x[:, :1]).expand_as(x)

    model = make_model("llama")
    swap(model, "model.layers.1.mlp", Pool(nn.Linear(32, 32)))
    gather(model, modules=["model.layers.1.mlp.inner"])
    with pytest.raises(
        CalibrationError, match=r"padding cannot be matched .*layers\.1\.mlp\.inner"
    ):
        gather(model, RAGGED, ["model.layers.1.mlp.inner"])


def test_a_progress_bar_counts_the_batches(make_model, capsys):
    collect(make_model("llama"), [UP], BATCHES, progress=True)
    assert "calibrating: 100%" in capsys.readouterr().err
