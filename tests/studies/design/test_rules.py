from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import OptionError
from tnlm.studies.design.rules import INSIGHTS, LayerSets, Rule

RULES = st.lists(
    st.one_of(
        st.builds(lambda n: Rule("spacing", value=n), st.integers(1, 4)),
        st.builds(lambda n: Rule("at-most", value=n), st.integers(1, 4)),
        st.builds(lambda n: Rule("avoid", layers=(n,)), st.integers(-7, 6)),
    ),
    max_size=4,
)


def keeps(rule, layers, depth):
    if rule.kind == "avoid":
        return not set(layers) & {layer % depth for layer in rule.layers}
    if rule.kind == "spacing":
        return all(b - a >= rule.value for a, b in pairwise(layers))
    return rule.kind != "at-most" or len(layers) <= rule.value


@given(RULES, st.integers(7, 9))
def test_the_sets_are_all_that_the_rules_allow(rules, depth):
    sets = LayerSets.under(rules, range(depth), depth)
    wanted = [
        layers
        for size in range(1, depth + 1)
        for layers in combinations(range(depth), size)
        if all(keeps(rule, layers, depth) for rule in rules)
    ]
    assert list(sets) == wanted
    assert sets.count == len(wanted) + 1


@given(RULES, st.sets(st.integers(0, 8)))
def test_thinned_layers_keep_the_rules_and_allowed_ones_stay(rules, chosen):
    sets = LayerSets.under(rules, range(9), 9)
    kept = sets.thin(sorted(chosen))
    assert set(kept) <= chosen
    assert all(keeps(rule, kept, 9) for rule in rules)
    assert sets.thin(kept) == kept
    assert bool(kept) == bool(chosen & set(sets.layers))


@pytest.mark.parametrize("rule", [*INSIGHTS, Rule("at-most", value=3)])
def test_rules_are_data(rule):
    assert Rule.from_dict(rule.to_dict()) == rule


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "avoids"}, "unknown rule 'avoids'; did you mean 'avoid'"),
        ({"kind": "avoid"}, "rule 'avoid' with layers=.*it takes layers"),
        ({"kind": "spacing", "layers": (1,)}, "it takes value"),
        ({"kind": "spacing", "value": 2, "layers": (1,)}, "it takes value"),
        ({"kind": "all-tensors", "value": 2}, "it takes neither"),
        ({"kind": "at-most", "value": 0}, "value=0; allowed: a whole number of at least 1"),
        ({"kind": "at-most", "size": 1}, "is not a rule"),
    ],
)
def test_broken_rules_are_refused(values, message):
    with pytest.raises(OptionError, match=message):
        Rule.from_dict(values)


def test_a_rule_about_a_layer_that_is_not_there_is_refused():
    with pytest.raises(OptionError, match="'avoid' names layer 4; allowed: -4 to 3"):
        LayerSets.under([Rule("avoid", layers=(4,))], range(4), 4)
