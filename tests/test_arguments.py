"""Arguments act or are refused, and texts that list choices list all of them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import tnlm
from tnlm.allocation import allocations
from tnlm.compression.budget_rules import UNITS
from tnlm.compression.choices import choices_of
from tnlm.compression.rules import CASCADES, NO_RECOVERY
from tnlm.errors import OptionError, TnlmError
from tnlm.metrics.named import measures
from tnlm.recovery.kinds import recoveries

IDLE = {
    "num_samples": 64,
    "max_length": 512,
    "gradient_samples": 16,
    "seed": 0,
    "bos": "auto",
    "cache_dir": "cache",
}
CHOICES = {
    "metric": measures(),
    "allocation": allocations(),
    "cascade": CASCADES,
    "recover": [NO_RECOVERY, *recoveries()],
    "unit": UNITS,
}


@pytest.mark.parametrize("name", [*IDLE, "tokenizer"])
@pytest.mark.parametrize("call", [tnlm.compress, tnlm.plan])
def test_what_is_about_data_is_refused_where_none_is_looked_at(
    call, name, tiny_llama, word_tokenizer
):
    model, value = tiny_llama(), (IDLE | {"tokenizer": word_tokenizer})[name]
    with pytest.raises(OptionError, match=f"{name}= has no effect on scheme 'svd'"):
        call(model, "svd", rank=4, progress=False, **{name: value})
    data = {"calibration": torch.arange(64) % 61 + 3, "max_length": 16} | {name: value}
    if name not in ("cache_dir", "max_length"):
        call(model, "svd-llm", rank=4, progress=False, **data)


def test_a_plan_without_data_refuses_it_too(tiny_llama):
    model = tiny_llama()
    decided = tnlm.plan(model, "svd", rank=4, progress=False)
    with pytest.raises(OptionError, match="num_samples= has no effect"):
        tnlm.compress(model, decided, num_samples=3, progress=False)


def test_what_is_not_given_has_its_default(tiny_llama):
    options = {"calibration": torch.arange(2048) % 61 + 3, "rank": 4, "progress": False}
    stated = {"num_samples": 64, "max_length": 512, "gradient_samples": 16, "seed": 0}
    plain, same = (tnlm.compress(tiny_llama(), "svd-llm", **options, **o) for o in ({}, stated))
    assert tnlm.report(plain).data == stated
    pairs = zip(plain.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_rank_search_without_data_refuses_what_would_not_act(tiny_llama):
    ids = torch.randint(3, 64, (2, 64), generator=torch.Generator().manual_seed(0))
    with pytest.raises(OptionError, match="seed= has no effect on scheme 'svd'"):
        tnlm.rank_search(
            tiny_llama(),
            "perplexity",
            search=ids[0],
            report=ids[1],
            scheme="svd",
            growth=1.1,
            max_length=16,
            seed=1,
            progress=False,
        )


@pytest.mark.parametrize("keyword", CHOICES)
def test_what_is_said_of_a_choice_lists_all_of_them(keyword):
    (text,) = (each.text for each in choices_of() if each.keyword == keyword)
    assert set(CHOICES[keyword]) <= set(re.findall(r"[\w-]+", text))


WRONG = {
    "targets": [3, True, [1], b"x", torch.tensor(2), (name for name in ["q_proj"])],
    "ignore": [3, True, False, [1], np.array([1, 2]), (name for name in ["q_proj"])],
    "seed": ["x", 0.5, True, 10**30, [], torch.tensor(2)],
    "bos": [1, 0, "x", [], np.array([1, 2])],
    "cache_dir": [3, True, "", "a\0b", object()],
    "cascade": [np.array([1, 2]), torch.ones(2)],
    "unit": [np.array([1, 2])],
    "recover": [np.array([1, 2])],
}


@pytest.mark.parametrize("keyword", WRONG)
def test_values_of_another_type_are_refused(keyword, tiny_llama):
    model = tiny_llama()
    for value in WRONG[keyword]:
        with pytest.raises(TnlmError, match=keyword):
            tnlm.compress(
                model,
                "svd-llm",
                calibration=torch.arange(64) % 61 + 3,
                max_length=16,
                progress=False,
                **{keyword: value},
            )


def test_data_given_twice_is_refused(tiny_llama):
    ids = torch.arange(64) % 61 + 3
    with pytest.raises(OptionError, match="training= and recovery= with training="):
        tnlm.compress(
            tiny_llama(), "svd", recovery=tnlm.Recovery("lora", training=ids), training=ids
        )
