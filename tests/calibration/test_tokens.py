"""Frequencies of tokens, and what tied heads read."""

from __future__ import annotations

import copy

import pytest
import torch

import tnlm
from tests.calibration.test_removal import IDS
from tnlm.calibration.data import token_batches
from tnlm.calibration.tokens import collect_tokens
from tnlm.errors import OptionError, TargetError
from tnlm.metrics.metric import Metric
from tnlm.metrics.named import get_measure

TABLE, HEAD = "model.embed_tokens", "lm_head"
TEXT = {"calibration": IDS, "max_length": 20, "num_samples": 4}


def batches_of(ids=IDS):
    return token_batches(ids, None, num_samples=4, max_length=20, seed=0)


def test_frequencies_are_counts_and_the_moment_is_of_what_the_head_reads(make_model):
    model, batches, seen = make_model("tied-llama"), batches_of(), []
    hook = model.lm_head.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    store = collect_tokens(model, {TABLE: [HEAD]}, batches, progress=False)
    hook.remove()
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    frequency = torch.bincount(ids, minlength=len(model.lm_head.weight)).double() / len(ids)
    torch.testing.assert_close(store.tensor(TABLE, "frequency"), frequency)
    x = torch.cat(seen).double()
    torch.testing.assert_close(store.tensor(TABLE, "moment"), x.T @ x / len(x), rtol=1e-5, atol=0)
    assert not model.lm_head._forward_pre_hooks


def test_padding_does_not_count(make_model):
    model = make_model("tied-llama")
    ids, mask = torch.tensor([[5, 6, 0, 0]]), torch.tensor([[1, 1, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = collect_tokens(model, {TABLE: []}, [batch], progress=False)
    assert found.tensor(TABLE, "frequency")[[0, 5, 6]].tolist() == [0.0, 0.5, 0.5]
    assert torch.equal(found.tensor(TABLE, "moment"), torch.eye(32).double())


def test_statistics_are_cached(make_model, tmp_path):
    model, batches = make_model("tied-llama"), batches_of()
    first = collect_tokens(model, {TABLE: [HEAD]}, batches, cache_dir=tmp_path, progress=False)
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("run again"))
    again = collect_tokens(model, {TABLE: [HEAD]}, batches, cache_dir=tmp_path, progress=False)
    for name in ("frequency", "moment"):
        torch.testing.assert_close(again.tensor(TABLE, name), first.tensor(TABLE, name))


@pytest.mark.parametrize("scheme", ["tensorgpt", "albert"])
def test_with_data_the_weighted_error_falls(scheme, make_model):
    dense = make_model("tied-llama")
    with torch.no_grad():  # directions that the head reads much of
        dense.model.norm.weight[:4] = 20.0
    table = dense.model.embed_tokens.weight.detach().clone()
    statistics = collect_tokens(dense, {TABLE: [HEAD]}, batches_of(), progress=False)
    measure = get_measure("tokens")
    metric = measure.build(lambda name: statistics.tensor(TABLE, name), measure.damping)
    errors = {}
    for name, data in (("blind", {}), ("data", TEXT)):
        model = tnlm.compress(
            copy.deepcopy(dense),
            scheme,
            keep_targets=0.6,
            progress=False,
            **data,
        )
        found = model.model.embed_tokens(torch.arange(len(table))).detach()
        errors[name] = metric.relative(table, found), Metric().relative(table, found)
    assert errors["data"][0] < 0.9 * errors["blind"][0]
    assert errors["data"][1] > errors["blind"][1]
    assert tnlm.report(model).plan.layers[0].error == pytest.approx(errors["data"][0], rel=1e-3)


def test_it_measures_embeddings_alone(make_model):
    with pytest.raises(TargetError, match="metric='tokens' measures embeddings alone"):
        tnlm.plan(make_model("llama"), "svd", metric="tokens", targets=["q_proj"], **TEXT)
    with pytest.raises(OptionError, match="kronecker can be fitted only under"):
        tnlm.plan(make_model("llama"), "kron", metric="tokens", **TEXT)
