from __future__ import annotations

import json

import pytest

import tnlm
from tnlm.errors import OptionError
from tnlm.plans.coverage import KEPT, Coverage, Left
from tnlm.plans.plan import Plan

EXPERTS = Left("experts", "h.*.experts.up", "a 3-D parameter", 2, 600, True)
TABLE = Left("embedding", "wte.weight", "targets= does not choose it", 1, 4000, False)
DENSE = Left(KEPT, "h.*.q.weight", "it is too small", 2, 100, True)
COVERED = Coverage(1000, (DENSE, EXPERTS, TABLE))


def test_targets_that_stay_dense_are_listed_and_not_outside():
    assert (COVERED.outside, COVERED.share) == (600, 0.4)
    assert [COVERED.part(each) for each in COVERED.left] == [0.1, 0.6, None]
    assert Coverage(0).share == 1.0


def test_more_than_a_third_outside_the_targets_is_warned_of():
    assert COVERED.warning().startswith("60% of the parameters in the model's blocks are outside")
    assert "experts 60%" in COVERED.warning()
    assert "embedding" not in COVERED.warning()
    assert not Coverage(1800, COVERED.left).warning()  # a third, and no more
    assert Coverage(1799, COVERED.left).warning()
    assert not Coverage(0, (TABLE,)).warning()


def test_the_table_has_a_line_for_each_kind_and_reason_the_largest_first():
    many = [Left("other", f"h.*.{name}", "a parameter of Mixer", 2, 8, True) for name in "abcde"]
    lines = Coverage(1000, (*COVERED.left, *many)).table()
    assert [line.split()[0] for line in lines] == ["left", "embedding", "experts", "kept", "other"]
    assert lines[2].endswith(" a 3-D parameter")
    assert lines[4].split()[:3] == ["other", "10", "40"]
    assert "h.*.a, h.*.b, h.*.c, 2 more" in lines[4]
    assert Coverage(9).table() == []


def test_a_plan_gives_it_back(make_model):
    plan = tnlm.plan(make_model("llama"), "svd", rank=4)
    assert plan.coverage is not None
    assert Plan.from_json(plan.to_json()) == plan
    assert "lm_head.weight" in str(plan)
    assert plan.summary()[-1].endswith("; 1.000 of the body's are targets")


def test_plans_and_reports_of_earlier_versions_say_nothing_of_it(make_model):
    plan = json.loads(tnlm.plan(make_model("llama"), "svd", rank=4).to_json())
    del plan["coverage"]
    read = Plan.from_json(json.dumps(plan))
    assert (read.coverage, read.left()) == (None, [])
    report = json.loads(tnlm.report(tnlm.compress(make_model("llama"), "svd", rank=4)).to_json())
    del report["coverage"]
    assert tnlm.Report.from_json(json.dumps(report)).plan.coverage is None


GROUP = {"kind": "head", "name": "a", "reason": "b", "count": 1, "params": 2, "in_body": False}


@pytest.mark.parametrize(
    "told",
    [
        3,
        {},
        {"left": []},
        {"body": "3", "left": []},
        {"body": 3, "left": [{"kind": "head"}]},
        {"body": 3, "left": [GROUP | {"params": "2"}]},
        {"body": 3, "left": [GROUP | {"name": 3}]},
    ],
)
def test_what_is_no_coverage_is_an_error(told, make_model):
    plan = json.loads(tnlm.plan(make_model("llama"), "svd", rank=4).to_json())
    with pytest.raises(OptionError, match="not a tnlm plan"):
        Plan.from_json(json.dumps({**plan, "coverage": told}))
