from __future__ import annotations

import math
import re

import pytest

from tnlm.allocation import allocations
from tnlm.compression import rules
from tnlm.compression.choices import Recovery
from tnlm.compression.request import make_request
from tnlm.decompositions import formats, get_format
from tnlm.errors import OptionError
from tnlm.metrics.measure import INPUTS
from tnlm.metrics.named import get_measure, measures

MEASURES = measures()

LOW_RANK = [get_format("low-rank")]


def refused(check, *arguments, error=OptionError):
    with pytest.raises(error) as caught:
        check(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("structure", formats().values(), ids=lambda s: s.name)
def test_a_format_is_fitted_only_under_what_it_says(measure, structure):
    plain = structure.name != "experts"
    if (not measure.needs and plain) or measure.form in structure.metrics:
        rules.check_measure("scheme", [structure], measure)
        return
    text = refused(rules.check_measure, "scheme", [structure], measure)
    assert f"metric={measure.name!r} with scheme 'scheme': {structure.name}" in text
    allowed = text.partition("fitted only under ")[2].split(", ")
    assert ("identity" if plain else "reap") in allowed
    for name in allowed:  # what it allows is allowed
        rules.check_measure("scheme", [structure], get_measure(name))


def test_every_format_has_to_serve_the_measure():
    both = [get_format("low-rank"), get_format("channels")]
    rules.check_measure("auto", both, get_measure("two-sided"))
    assert ": channels" in refused(
        rules.check_measure, "auto", both, get_measure("fisher-elements")
    )


def test_options_belong_to_one_of_the_formats():
    both = [get_format("low-rank"), get_format("channels")]
    rules.check_options("auto", both, {"rank": 3, "width": 4, "gauge": False})
    assert "unknown option 'widht' for scheme 'auto'; did you mean 'width'" in refused(
        rules.check_options, "auto", both, {"widht": 3}
    )
    assert "width=0; allowed: a whole number >= 1" in refused(
        rules.check_options, "auto", both, {"width": 0}
    )


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, math.nan, math.inf, "0.1", True, [0.1]])
def test_damping_is_a_fraction(value):
    text = refused(rules.check_damping, get_measure("input"), value)
    assert f"damping={value!r}; allowed: a fraction in [0, 1)" in text


def test_damping_needs_something_to_damp():
    assert "no effect with metric='identity'" in refused(
        rules.check_damping, get_measure("identity"), 0.1
    )
    rules.check_damping(get_measure("identity"), None)
    for value in (0, 0.0, 0.999):
        rules.check_damping(get_measure("fisher-elements"), value)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("cascade", rules.CASCADES)
def test_a_cascade_needs_a_measure_that_looks_at_inputs(measure, cascade):
    if cascade != "none" and measure.name == "surgery":
        assert "allowed: cascade='none'" in refused(rules.check_cascade, measure, cascade)
    elif cascade == "none" or INPUTS in measure.needs:
        rules.check_cascade(measure, cascade)
    else:
        text = refused(rules.check_cascade, measure, cascade)
        assert f"cascade={cascade!r} with metric={measure.name!r}" in text
        assert "allowed: a metric that does" in text


@pytest.mark.parametrize("cascade", ["anchord", None, 3, ["none"], True])
def test_an_unknown_cascade_names_the_known(cascade):
    text = refused(rules.check_cascade, get_measure("input"), cascade)
    assert f"unknown cascade {cascade!r}" in text
    assert "anchored" in text


@pytest.mark.parametrize("measure", MEASURES.values(), ids=lambda m: m.name)
@pytest.mark.parametrize("cascade", rules.CASCADES)
def test_channels_are_chosen_together(measure, cascade):
    channels = [get_format("low-rank"), get_format("channels")]
    rules.check_channels(LOW_RANK, measure, cascade)
    if measure.name in ("input", "two-sided") and cascade == "none":
        rules.check_channels(channels, measure, cascade)
    else:
        text = refused(rules.check_channels, channels, measure, cascade)
        assert f"metric={measure.name!r} and cascade={cascade!r} cannot select channels" in text
        assert "allowed: metric='input' or 'two-sided', and cascade='none'" in text


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_shared_blocks_are_counted(value):
    text = refused(rules.check_share, LOW_RANK, get_measure("input"), "none", value)
    assert f"share={value!r}; allowed: a number of blocks, 1 for none" in text


@pytest.mark.parametrize("structure", formats().values(), ids=lambda s: s.name)
def test_only_low_rank_shares_a_factor(structure):
    rules.check_share([structure], get_measure("input"), "anchored", 1)
    if structure.stacks:
        rules.check_share([structure], get_measure("input"), "none", 3)
    else:
        text = refused(rules.check_share, [structure], get_measure("input"), "none", 3)
        assert f"share=3 with {structure.name}; allowed: low rank" in text


def test_sharing_excludes_cascades_and_biases():
    for metric, cascade in (("input", "anchored"), ("centered", "none")):
        text = refused(rules.check_share, LOW_RANK, get_measure(metric), cascade, 2)
        assert f"cascade={cascade!r} or metric={metric!r}" in text


@pytest.mark.parametrize("structure", formats().values(), ids=lambda s: s.name)
def test_some_allocations_share_out_ranks(structure):
    for allocation in allocations().values():
        measure = get_measure(allocation.metric or "input")
        if allocation.formats is not None and structure.name not in allocation.formats:
            asked = allocation, [structure], measure
            text = refused(rules.check_shared_formats, *asked)
            wanted = f"allocation={allocation.name!r} with {structure.name}; allowed: "
            assert text.startswith(wanted + ", ".join(sorted(allocation.formats)))
        else:
            rules.check_shared_formats(allocation, [structure], measure)


@pytest.mark.parametrize("value", ["auto", 1, None])
def test_fused_projections_are_split_or_not(value):
    text = refused(rules.check_split, value)
    assert text == f"split={value!r}; allowed: True or False"
    rules.check_split(False)


@pytest.mark.parametrize("value", [-1, 1.0, True, "8"])
def test_refining_takes_a_number_of_tokens_or_of_passes(value):
    text = refused(rules.check_refine, Recovery(refine=value), 0)
    assert f"refine={value!r}; allowed: a number of tokens, 0 for none" in text
    text = refused(rules.check_refine, Recovery(refine_passes=value), 0)
    assert f"refine_passes={value!r}; allowed: a number of passes" in text


@pytest.mark.parametrize(
    ("given", "default", "expected"),
    [
        ({}, 0, (0, 0)),
        ({}, 25, (0, 25)),
        ({"refine": 0}, 25, (0, 0)),
        ({"refine": 8}, 25, (8, 0)),
        ({"refine_passes": 0}, 25, (0, 0)),
        ({"refine_passes": 3}, 25, (0, 3)),
        ({"refine_passes": 0, "refine": 0}, 25, (0, 0)),
    ],
)
def test_tokens_or_passes_replace_the_passes_of_a_scheme(given, default, expected):
    assert rules.check_refine(Recovery(**given), default) == expected


def test_tokens_and_passes_are_not_given_together():
    for tokens, passes in ((8, 3), (0, 3), (8, 0)):
        given = Recovery(refine=tokens, refine_passes=passes)
        text = refused(rules.check_refine, given, 0)
        assert text == f"refine={tokens} tokens and refine_passes={passes} are both given; give one"


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.5", None])
def test_an_anchor_is_a_fraction(value):
    text = refused(rules.check_anchor, "anchored", value)
    assert text == f"anchor={value!r}; allowed: a fraction in [0, 1]"
    for right in (0, 0.25, 1, 1.0):
        rules.check_anchor("anchored", right)


@pytest.mark.parametrize("cascade", ["none", "sequential"])
def test_an_anchor_needs_an_anchored_cascade(cascade):
    assert "allowed with cascade='anchored'" in refused(rules.check_anchor, cascade, 0.5)
    rules.check_anchor(cascade, 1.0)


RULES = {
    "metric": {"metric": "covariance", "cascade": "sequential"},
    "damping": {"metric": "input", "damping": 0.25},
    "cascade": {"metric": "input", "cascade": "anchored"},
    "anchor": {"metric": "input", "cascade": "anchored", "anchor": 0.25},
    "refine": {"refine": 64},
    "refine_passes": {"refine_passes": 3},
    "share": {"metric": "input", "share": 2},
    "keep": {"keep": 0.9},
    "keep_targets": {"keep_targets": 0.4},
    "tolerance": {"tolerance": 0.2},
    "max_macs": {"max_macs": 1.5},
    "unit": {"unit": "bytes", "allocation": "loss"},
    "blocks": {"blocks": 3, "allocation": "last"},
    "allocation": {"allocation": "energy"},
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_accepted_is_recorded(name):
    asked = make_request("svd", gauge=False, **RULES[name])
    record = asked.record()
    assert record["gauge"] is False
    for key, value in RULES[name].items():
        if key == "metric":
            assert asked.measure.name == value  # a plan holds it beside the record
        else:
            assert record[key] == value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"damping": 0.1}, "damping= has no effect"),
        ({"cascade": "anchored"}, "cascade='anchored' with metric='identity'"),
        ({"share": 0}, "share=0"),
        ({"refine": -1}, "refine=-1"),
        ({"refine_passes": -1}, "refine_passes=-1"),
        ({"anchor": 0.5}, "anchor=0.5 has no effect with cascade='none'"),
        ({"unit": "bytes"}, "unit='bytes' with allocation='uniform'"),
        ({"blocks": 2}, "blocks=2 has no effect with allocation='uniform'"),
        ({"allocation": "last", "blocks": 0}, "blocks=0"),
        ({"allocation": "lost"}, "did you mean 'loss'"),
        ({"allocation": 3}, "unknown allocation 3"),
        ({"allocation": "loss", "tolerance": 0.1}, "tolerance with allocation='loss'"),
        ({"keep": 2}, "keep=2; allowed: a fraction in (0, 1]"),
        ({"max_macs": 0}, "max_macs=0"),
    ],
)
def test_a_request_asks_every_rule(arguments, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        make_request("svd", **arguments)


@pytest.mark.parametrize(
    ("scheme", "arguments", "words"),
    [
        ("auto", {"metric": "covariance"}, "cannot select channel-ranks or channels"),
        ("auto", {"cascade": "sequential"}, "cannot select channel-ranks or channels"),
        ("kron", {"share": 2}, "share=2 with kronecker"),
        ("kron", {"allocation": "truncation"}, "truncation' with kronecker"),
        ("modegpt", {"tolerance": 0.1, "width": 4}, "tolerance and width given"),
        ("basis-sharing", {"cascade": "anchored"}, "share=2 with cascade='anchored'"),
        ("albert", {"metric": "tokens", "allocation": "loss"}, "an embedding affects the loss"),
    ],
)
def test_the_choices_of_a_scheme_are_held_to_the_rules(scheme, arguments, words):
    with pytest.raises(OptionError, match=re.escape(words)):
        make_request(scheme, **arguments)


@pytest.mark.parametrize("recover", ["lora", "correct"])
@pytest.mark.parametrize("scheme", ["reap", "tensorgpt"])
def test_adapters_without_a_compressed_linear_layer_are_refused_early(scheme, recover):
    with pytest.raises(OptionError, match="trains compressed linear layers"):
        make_request(scheme, recover=recover)
    assert make_request(scheme, recover="distill").recover == "distill"
