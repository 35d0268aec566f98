"""Every keyword is written once, and given alone or in its group."""

from __future__ import annotations

import inspect

import pytest
import torch

import tnlm
from tnlm.compression.choices import GROUPS, choices_of, gather_choices
from tnlm.errors import OptionError, TnlmError

IDS = torch.arange(256) % 61 + 3
VALUES = {
    "metric": "input",
    "allocation": "loss",
    "cascade": "sequential",
    "damping": 0.1,
    "share": 2,
    "calibration": IDS,
    "tokenizer": "a tokenizer",
    "num_samples": 4,
    "max_length": 32,
    "bos": True,
    "gradient_samples": 2,
    "cache_dir": "cache",
    "seed": 3,
    "lora_rank": 4,
    "lora_steps": 10,
    "lora_step": 0.5,
    "temperature": 0.5,
    "column": "text",
    "split": False,
    "precision": "int4",
    "group": 32,
    "symmetric": False,
    "keep": 0.5,
    "keep_targets": 0.4,
    "tolerance": 0.1,
    "max_macs": 2.0,
    "unit": "bytes",
    "workload": "prefill:64",
    "prices": "machine.json",
    "blocks": 3,
    "portable": "llama.cpp",
    "recover": "lora",
    "recover_tokens": 100,
    "training": "text.txt",
    "refine": 8,
    "refine_passes": 3,
    "anchor": 0.25,
}


def test_every_keyword_is_known_here():
    assert {each.keyword for each in choices_of()} == set(VALUES)


@pytest.mark.parametrize("each", [*choices_of()], ids=lambda each: each.keyword)
def test_a_keyword_reaches_its_group(each):
    asked = gather_choices("svd", {each.keyword: VALUES[each.keyword]})
    assert getattr(getattr(asked, each.group), each.field) is VALUES[each.keyword]
    assert asked.options == {}
    plain = gather_choices("svd", {})
    for group in GROUPS:
        if group != each.group:
            assert getattr(asked, group) == getattr(plain, group)


@pytest.mark.parametrize("each", [*choices_of("budget", "recovery")], ids=lambda each: each.keyword)
def test_a_group_says_the_same_as_its_keywords(each):
    kind, value = GROUPS[each.group], VALUES[each.keyword]
    whole = gather_choices("svd", {each.group: kind(**{each.field: value})})
    assert whole == gather_choices("svd", {each.keyword: value})
    with pytest.raises(OptionError, match=f"{each.keyword}= and {each.group}= .* give one"):
        gather_choices("svd", {each.group: kind(**{each.field: value}), each.keyword: value})


def test_a_group_of_another_class_is_refused():
    with pytest.raises(OptionError, match=r"budget= is a float; give a tnlm\.Budget"):
        gather_choices("svd", {"budget": 0.5})
    with pytest.raises(OptionError, match=r"recovery= is a str; give a tnlm\.Recovery"):
        gather_choices("svd", {"recovery": "lora"})


def test_groups_and_keywords_compress_alike(tiny_llama):
    one, other = tiny_llama(), tiny_llama()
    tnlm.compress(one, "svd-llm", calibration=IDS, max_length=32, keep_targets=0.5, progress=False)
    tnlm.compress(
        other,
        tnlm.scheme("svd-llm"),
        calibration=tnlm.Calibration(IDS, max_length=32),
        budget=tnlm.Budget(keep_targets=0.5),
        progress=False,
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert tnlm.report(one).plan == tnlm.report(other).plan


def test_a_changed_scheme_compresses_as_the_keywords_do(tiny_llama):
    changed = tnlm.scheme("kron", allocation="energy", terms=2)
    assert changed.name == "kron"
    plan = tnlm.plan(tiny_llama(), changed, progress=False)
    asked = tnlm.plan(tiny_llama(), "kron", allocation="energy", terms=2, progress=False)
    assert plan.layers == asked.layers
    assert plan.request == asked.request


def test_a_changed_scheme_is_held_to_the_rules(tiny_llama):
    with pytest.raises(OptionError, match="unknown scheme 'kro'; did you mean 'kron'"):
        tnlm.scheme("kro")
    for changes in ({"metric": "inputs"}, {"term": 2}, {"cascade": "anchored"}):
        with pytest.raises(TnlmError):
            tnlm.compress(tiny_llama(), tnlm.scheme("kron", **changes), progress=False)


@pytest.mark.parametrize("wrong", ["keep_target", "calibraton", "metrics", "term"])
@pytest.mark.parametrize("call", [tnlm.compress, tnlm.plan])
def test_a_misspelt_keyword_is_named_with_the_one_that_is_meant(wrong, call, tiny_llama):
    with pytest.raises(OptionError, match=f"{wrong!r}.*did you mean '{wrong[:4]}"):
        call(tiny_llama(), "kron", **{wrong: 0.5})


def test_the_call_names_the_common_keywords():
    named = set(inspect.signature(tnlm.compress).parameters)
    assert {"keep", "keep_targets", "calibration", "tokenizer", "budget", "recovery"} <= named


@pytest.mark.parametrize(
    ("scheme", "asked", "allocation"),
    [
        ("kron", {}, "loss"),
        ("kron", {"keep_targets": 0.6}, "loss"),
        ("kron", {"terms": 4, "keep": 0.6}, "loss"),
        ("kron", {"terms": 4}, "uniform"),
        ("tucker", {"ranks": (4, 4, 4)}, "uniform"),
        ("btt", {"rank": 2}, "uniform"),
        ("tt", {"tolerance": 0.1}, "uniform"),
        (tnlm.scheme("tt", allocation="uniform"), {"keep_targets": 0.6}, "uniform"),
        (tnlm.scheme("tt", ranks=(2,)), {}, "uniform"),
    ],
)
def test_with_data_the_loss_shares_out_a_budget_that_nothing_else_sets(scheme, asked, allocation):
    made = gather_choices(scheme, {"calibration": [1, 2, 3], **asked}).scheme
    assert (made.metric, made.allocation) == ("two-sided", allocation)


def test_a_copy_of_a_scheme_with_a_metric_keeps_it_with_data():
    made = gather_choices(tnlm.scheme("kron", metric="identity"), {"calibration": [1, 2]}).scheme
    assert (made.metric, made.allocation) == ("identity", "uniform")
