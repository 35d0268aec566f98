from __future__ import annotations

import math
import re

import pytest

import tnlm
from tnlm.compression.request import make_request
from tnlm.errors import BudgetError, OptionError, RankError
from tnlm.schemes import get_scheme
from tnlm.tensors.network import Cost

BUDGETS = ("keep", "keep_targets", "tolerance")


def request(scheme="svd", *, options=None, **budget):
    return make_request(scheme, **budget, **(options or {}))


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("kro", "did you mean 'kron'"),
        ("SVD-LLM", "Allowed: .*svd, svd-llm, svd-llm-v2"),
        ("", "Allowed"),
    ],
)
def test_an_unknown_scheme_gets_a_hint(word, hint):
    with pytest.raises(OptionError, match=f"unknown scheme {word!r}.*{hint}"):
        request(word)


@pytest.mark.parametrize("scheme", [None, 3, ["svd"]])
def test_a_scheme_is_a_name(scheme):
    with pytest.raises(OptionError, match=f"unknown scheme {re.escape(repr(scheme))}"):
        request(scheme)


@pytest.mark.parametrize(
    ("scheme", "option", "hint"),
    [
        ("svd", "rnk", "did you mean 'rank'"),
        ("svd", "terms", "Allowed: gauge, rank"),
        ("kron", "rank", "Allowed: gauge, in_split, out_split, terms"),
        ("tt", "rank", "did you mean 'ranks'"),
        ("svd", "target", "Allowed"),
    ],
)
def test_an_unknown_option_gets_a_hint(scheme, option, hint):
    with pytest.raises(OptionError, match=f"unknown option {option!r} .*{scheme!r}.*{hint}"):
        request(scheme, options={option: 2})


@pytest.mark.parametrize("value", [1.0, "4", True, False, 0, -1, [4], (4,), math.nan, 1j])
@pytest.mark.parametrize(("scheme", "option"), [("svd", "rank"), ("kron", "terms")])
def test_counts_are_whole_numbers_from_one(scheme, option, value):
    with pytest.raises(OptionError, match=rf"{option}=.*; allowed: a whole number >= 1"):
        request(scheme, options={option: value})


@pytest.mark.parametrize("value", [4, 2.0, "44", [], [2, 0], [2.0, 2], [True, 4], [[2], 4], {2: 4}])
@pytest.mark.parametrize(
    ("scheme", "option"), [("tt", "ranks"), ("kron", "out_split"), ("tucker", "in_split")]
)
def test_ranks_and_splits_are_lists_of_whole_numbers(scheme, option, value):
    wanted = rf"{option}=.*; allowed: a list, each entry a whole number"
    with pytest.raises(OptionError, match=wanted):
        request(scheme, options={option: value})


@pytest.mark.parametrize("value", [0, 1, "yes", [True]])
def test_gauge_is_a_flag(value):
    with pytest.raises(OptionError, match=r"gauge=.*; allowed: true or false"):
        request(options={"gauge": value})


def test_an_option_of_none_counts_as_not_given():
    assert request(options={"rank": None}).options == {}
    assert request("albert", options={"gauge": None}).options == {"gauge": False}
    assert request("albert", options={"gauge": True}).options == {"gauge": True}


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("value", [0, -0.1, 1.01, math.nan, math.inf, "0.5", True, [0.5]])
def test_budgets_are_fractions(name, value):
    with pytest.raises(BudgetError, match=rf"{name}=.*; allowed: a fraction in \(0, 1\]"):
        request(**{name: value})


@pytest.mark.parametrize("names", [BUDGETS, BUDGETS[:2], BUDGETS[1:]])
def test_budgets_exclude_each_other(names):
    with pytest.raises(BudgetError, match=f"{' and '.join(names)} given; allowed: one of"):
        request(**dict.fromkeys(names, 0.5))


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("svd", {"rank": 4}), ("kron", {"terms": 2}), ("tt", {"ranks": [4]})],
)
def test_a_tolerance_chooses_the_ranks_itself(scheme, options):
    # Otherwise one of the two would be accepted and do nothing.
    with pytest.raises(BudgetError, match=f"tolerance and {next(iter(options))}"):
        request(scheme, options=options, tolerance=0.1)


def test_a_tolerance_goes_with_splits_and_gauge():
    options = {"out_split": [4, 8], "gauge": False}
    assert request("kron", options=options, tolerance=0.1).options == options


@pytest.mark.parametrize("value", [0, -1, math.nan, "1", True])
def test_multiply_adds_are_limited_by_a_positive_number(value):
    with pytest.raises(BudgetError, match=r"max_macs=.*; allowed: a number > 0, or inf"):
        request(max_macs=value)


def cost(params):
    return Cost(params, 4 * params, params)


def test_multiply_adds_may_be_without_limit():
    assert request(max_macs=math.inf).limits(cost(10), cost(5)).max_macs == math.inf
    assert "max_macs" not in request(max_macs=math.inf).record()


@pytest.mark.parametrize("metric", ["inputs", "fisher", 3])
def test_an_unknown_metric_gets_a_hint(metric):
    with pytest.raises(
        OptionError, match=r"unknown metric .* Allowed: centered, covariance, diagonal"
    ):
        request(metric=metric)


def test_a_metric_that_the_format_cannot_serve_is_refused():
    with pytest.raises(OptionError, match="token-mps can be fitted only under identity"):
        request("tensorgpt", metric="input")
    assert request("svd", metric="input").measure.name == "input"


@pytest.mark.parametrize(
    ("scheme", "options", "whole"),
    [
        ("svd", {}, False),
        ("svd", {"rank": 4}, True),
        ("svd", {"gauge": False}, False),
        ("tt", {"ranks": [4]}, True),
        ("kron", {"terms": 4}, False),
        ("kron", {"terms": 4, "out_split": [2, 3], "in_split": [2, 2]}, True),
        ("modegpt", {"width": 4}, False),
        ("modegpt", {"rank": 4}, False),
        ("modegpt", {"rank": 4, "width": 4}, True),
    ],
)
def test_without_a_budget_the_default_holds_unless_the_size_is_given(scheme, options, whole):
    keep = request(scheme, options=options).limits(cost(100), cost(50)).keep
    assert keep == (1.0 if whole else get_scheme(scheme).keep_targets)


@pytest.mark.parametrize(
    ("unit", "keep", "expected"), [("params", 0.8, 0.6), ("bytes", 0.8, 0.5), ("macs", 0.8, 0.2)]
)
def test_a_budget_counts_in_its_unit(unit, keep, expected):
    model, targets = Cost(100, 1000, 80), Cost(50, 400, 20)
    asked = request(allocation="loss", unit=unit, keep=keep)
    limits = asked.limits(model, targets)
    assert limits.keep == pytest.approx(expected)
    assert limits.price(targets) == getattr(targets, unit)
    # Targets at this fraction, and all else as it is, make up the budget.
    rest = getattr(model, unit) - getattr(targets, unit)
    assert rest + limits.keep * getattr(targets, unit) == pytest.approx(keep * getattr(model, unit))
    share = request(allocation="loss", unit=unit, keep_targets=0.3).limits(model, targets)
    assert (share.keep, share.unit) == (0.3, unit)


def test_targets_without_multiply_adds_have_no_fraction_of_them():
    # Looking embeddings up takes none.
    asked = request(allocation="loss", unit="macs", keep=0.9)
    with pytest.raises(
        BudgetError, match=r"keep=0\.9 counts multiply-adds, but the targets have none"
    ):
        asked.limits(Cost(100, 400, 80), Cost(50, 200, 0))


def test_the_limits_carry_what_was_asked():
    asked = request(
        allocation="last", unit="macs", blocks=3, keep_targets=0.5, max_macs=2, options={"rank": 3}
    )
    limits = asked.limits(cost(100), cost(50))
    assert (limits.blocks, limits.unit, limits.max_macs) == (3, "macs", 2.0)
    assert (limits.keep, limits.tolerance, dict(limits.options)) == (0.5, None, {"rank": 3})
    loose = request(tolerance=0.2).limits(cost(100), cost(50))
    assert (loose.keep, loose.tolerance) == (1.0, 0.2)


@pytest.mark.parametrize(
    ("scheme", "arguments", "needs"),
    [
        ("svd", {}, set()),
        ("svd", {"allocation": "energy"}, set()),
        ("svd", {"allocation": "loss"}, {"inputs", "gradients"}),
        ("svd-llm", {}, {"inputs"}),
        ("svd-llm", {"allocation": "loss"}, {"inputs", "gradients"}),
        ("kfac-svd", {"allocation": "loss"}, {"inputs", "gradients"}),
        ("fwsvd", {}, {"fisher"}),
        ("fwsvd", {"allocation": "loss"}, {"fisher"}),
        ("tfwsvd", {"allocation": "loss"}, {"fisher"}),
    ],
)
def test_only_the_statistics_that_are_used_are_needed(scheme, arguments, needs):
    asked = request(scheme, **arguments)
    assert asked.needs == needs
    assert asked.looks_at_data == bool(needs)


def test_tuning_looks_at_data_as_well():
    assert request(refine=8).looks_at_data
    assert not request(refine=0).looks_at_data


def test_the_damping_is_the_measures_own_unless_asked():
    assert request("svd-llm").damping == 1e-6
    assert request("kfac-svd").damping == 0.05
    assert request("kfac-svd", damping=0).damping == 0
    assert request("kfac-svd", damping=0).record()["damping"] == 0
    assert "damping" not in request().record()


def test_keep_counts_what_lies_outside_the_targets():
    assert request(keep=0.7).limits(cost(100), cost(50)).keep == pytest.approx(0.4)
    assert request(keep=1).limits(cost(100), cost(50)).keep == 1.0
    assert request(keep_targets=0.7).limits(cost(100), cost(50)).keep == 0.7


@pytest.mark.parametrize("targets", [3, 2331, 3500, 4001])
def test_keep_too_small_states_one_that_is_not(targets):
    with pytest.raises(BudgetError, match="lie outside the targets") as caught:
        request(keep=0.1).limits(cost(7000), cost(targets))
    smallest = re.search(r"smallest possible is keep=([\d.]+),", str(caught.value))
    assert 0 < request(keep=float(smallest[1])).limits(cost(7000), cost(targets)).keep <= 1


@pytest.mark.parametrize(
    ("scheme", "options", "most"),
    [
        ("svd", {"rank": 17}, "allows 1 to 16"),
        ("kron", {"terms": 33}, "at most 32"),
        ("kron", {"terms": 2, "out_split": [3, 5]}, "multiplies to 15, not to 32"),
        ("tt", {"ranks": [9], "out_split": [4, 4]}, "multiplies to 16, not to 32"),
        ("tucker", {"ranks": [2] * 9}, "2 to 4 ranks"),
    ],
)
def test_what_a_matrix_cannot_have_names_the_matrix(scheme, options, most, tiny_llama):
    with pytest.raises(RankError, match=rf"model\.layers\.0\.\S+: .*{most}.*ignore="):
        tnlm.plan(tiny_llama(), scheme, **options)


def test_the_record_holds_what_was_asked_as_plain_values():
    asked = request("tt", options={"ranks": (2, 3)}, keep=0.5, max_macs=2)
    assert asked.record() == {
        "keep": 0.5,
        "max_macs": 2.0,
        "allocation": "uniform",
        "cascade": "none",
        "unit": "params",
        "ranks": [2, 3],
    }
