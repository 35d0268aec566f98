from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import EvaluationError
from tnlm.evaluation.comparison import compared, digest, figures
from tnlm.evaluation.flips import flips
from tnlm.evaluation.results import Evaluation, Figure, Flips, TaskResult
from tnlm.evaluation.statistics import mean_stderr, paired_stderr, stderr_of, value_of
from tnlm.evaluation.tasks.base import TaskMetric
from tnlm.evaluation.tasks.lambada_openai import perplexity

ACC = TaskMetric("acc")
bits = st.lists(st.booleans(), min_size=2, max_size=40)


def items(values):
    return [{"acc": float(value)} for value in values]


@given(bits)
def test_the_error_of_a_share_is_the_sample_formula(values):
    p, n = sum(values) / len(values), len(values)
    assert value_of(ACC, items(values)) == pytest.approx(p)
    assert stderr_of(ACC, items(values), 0) == pytest.approx(math.sqrt(p * (1 - p) / (n - 1)))


@given(bits)
def test_a_model_beside_itself_differs_by_nothing(values):
    scores = items(values)
    assert paired_stderr(ACC, scores, scores, 0) == 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40))
def test_flips_account_for_every_item_and_for_the_difference(pairs):
    now, before = items(a for a, _ in pairs), items(b for _, b in pairs)
    found = flips([float(b) for _, b in pairs], [float(a) for a, _ in pairs])
    changed = len(found.learned) + len(found.unlearned)
    assert changed + len(found.right) + len(found.wrong) == len(pairs)
    difference = value_of(ACC, now) - value_of(ACC, before)
    assert len(found.learned) - len(found.unlearned) == pytest.approx(difference * len(pairs))


def test_the_bootstrap_is_near_the_formula_and_repeats():
    scores = [{"acc": float(i % 3 == 0)} for i in range(200)]
    mean = TaskMetric("acc", aggregate=lambda s: sum(each["acc"] for each in s) / len(s))
    found = stderr_of(mean, scores, 1)
    assert found == pytest.approx(stderr_of(ACC, scores, 0), rel=0.1)
    assert found == stderr_of(mean, scores, 1)
    assert paired_stderr(mean, scores, scores, 0) == 0


def test_one_item_has_no_error_and_a_missing_score_no_figure():
    assert mean_stderr([1.0]) is None
    assert stderr_of(TaskMetric("ppl", aggregate=perplexity), [{"loglikelihood": -1.0}], 0) is None
    assert value_of(TaskMetric("other"), items([True])) is None
    assert [f.metric for f in figures([ACC, TaskMetric("other")], items([True, False]), 0)] == [
        "acc"
    ]


def test_a_score_that_is_not_finite_is_refused():
    with pytest.raises(EvaluationError, match="acc is nan: a score is not finite"):
        value_of(ACC, [{"acc": float("nan")}])
    with pytest.raises(EvaluationError, match="mean loss is 900: its perplexity overflows a float"):
        perplexity([{"loglikelihood": -900.0}])


def result(values, asked="q", **fields):
    scores = tuple(items(values))
    known = {"task": "piqa", "n": len(scores), "num_fewshot": 0, "truncated": 0, "right": "acc"}
    made = figures([ACC], scores, 0)
    return TaskResult(**known, figures=made, items=scores, digest=digest(asked), **fields)


def test_a_comparison_pairs_the_items():
    before = Evaluation((result([1, 1, 0, 0]),), "tnlm", 0)
    found = compared(result([1, 0, 0, 1]), before, [ACC], 0)
    figure = found["acc"]
    assert (figure.value, figure.baseline, figure.difference) == (0.5, 0.5, 0.0)
    assert figure.difference_stderr == pytest.approx(mean_stderr([0, -1, 0, 1]))
    assert found.flips == Flips((3,), (1,), (0,), (2,))
    with pytest.raises(EvaluationError, match=r"piqa: the baseline answered other questions \(n=4"):
        compared(result([1, 0], asked="r"), before, [ACC], 0)


def test_json_gives_back_the_evaluation_and_tables_show_it():
    before = Evaluation((result([1, 1, 0, 0]),), "tnlm", 0)
    found = Evaluation((compared(result([1, 0, 0, 1]), before, [ACC], 0),), "tnlm", 7)
    assert Evaluation.from_json(found.to_json()) == found
    lines = str(found).splitlines()
    assert lines[0].split()[-3:] == ["baseline", "difference", "stderr"]
    assert "0.5000" in lines[1]
    assert lines[2] == "piqa: learned 1, unlearned 1, right in both 1, wrong in both 1"
    assert lines[-1] == "scored by tnlm, seed 7"


def test_names_that_are_not_there_and_text_that_is_no_evaluation():
    found = Evaluation((result([1, 0]),), "tnlm", 0)
    with pytest.raises(EvaluationError, match="'piq' was not evaluated; did you mean 'piqa'"):
        found["piq"]
    with pytest.raises(EvaluationError, match="piqa has no metric 'ac'; did you mean 'acc'"):
        found["piqa"]["ac"]
    for text in ("", "{}", '{"results": [1], "scorer": "", "seed": 0}'):
        with pytest.raises(EvaluationError, match="not an evaluation in JSON"):
            Evaluation.from_json(text)


def test_a_figure_needs_no_error():
    figure = Figure("acc", 0.5, None)
    shown = str(Evaluation((TaskResult("t", 1, 0, 2, (figure,), "", (), ""),), "tnlm", 0))
    assert "t: 2 cut" in shown
