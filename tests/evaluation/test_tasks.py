from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import EvaluationError
from tnlm.evaluation.rows import adapted, with_examples
from tnlm.evaluation.tasks import Answer, Item, get_task, list_tasks, tasks
from tnlm.evaluation.tasks.base import gold_of
from tnlm.evaluation.tasks.gsm8k import first_marked, last_number, normal
from tnlm.evaluation.tasks.winobias import OCCUPATIONS

LABELLED = {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}
ORIGINAL = {
    "arc_easy": {"question": "q", "choices": LABELLED, "answerKey": "B"},
    "openbookqa": {"question_stem": "q", "choices": LABELLED, "answerKey": "B "},
    "piqa": {"goal": "q", "sol1": "a", "sol2": "b", "label": 1},
    "hellaswag": {
        "activity_label": "Cook",
        "ctx_a": "Cut [title] it.",
        "ctx_b": "then",
        "endings": ["a", "b [x]"],
        "label": "1",
    },
    "winogrande": {"sentence": "So _ is.", "option1": "a", "option2": "b", "answer": "2"},
    "mmlu": {"question": "q", "choices": list("abcd"), "answer": 1, "subject": "high_school"},
    "truthfulqa_mc1": {
        "question": "q",
        "mc1_targets": {"choices": ["a", "b"], "labels": [0, 1]},
    },
}


@pytest.mark.parametrize("task", list(ORIGINAL))
def test_the_published_layouts_are_read(task):
    [row] = adapted(get_task(task), [ORIGINAL[task]])
    assert row["gold"] == 1
    item = get_task(task).item(row)
    assert item.gold == 1
    assert item.shot.endswith("is." if task == "winogrande" else ("B", "b", "b "))


@pytest.mark.parametrize(
    ("task", "prompt", "answer"),
    [
        ("arc_easy", "Question: q\nAnswer:", " b"),
        ("piqa", "Question: q\nAnswer:", " b"),
        ("openbookqa", "q", " b"),
        ("hellaswag", "Cook: Cut. it. Then", " b "),
        ("winogrande", "So b", " is."),
        ("mmlu", "q\nA. a\nB. b\nC. c\nD. d\nAnswer:", " B"),
    ],
)
def test_prompts(task, prompt, answer):
    [row] = adapted(get_task(task), [ORIGINAL[task]])
    assert get_task(task).item(row).pairs[1] == (prompt, answer)


def test_truthfulqa_asks_after_six_examples_and_drops_empty_answers():
    row = {"query": "q", "choices": ["", "a", "b"], "gold": 2}
    item = get_task("truthfulqa_mc1").item(get_task("truthfulqa_mc1").adapt(row))
    assert item.pairs[0][0].count("Q: ") == 7
    assert item.pairs[0][0].endswith("Spain.\n\nQ: q\nA:")
    assert (item.choices, item.gold) == (("a", "b"), 1)


def test_truthfulqa_shares_probability():
    task = get_task("truthfulqa_mc2")
    row = {"question": "q", "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}}
    item = task.item(task.adapt(row))
    answers = [Answer(math.log(p) - 2000) for p in (0.2, 0.5, 0.3)]  # far below the least float
    assert task.score(item, answers)["acc"] == pytest.approx(0.5)
    with pytest.raises(EvaluationError, match="no gold answer: labels must be 0 or 1"):
        task.adapt({"query": "q", "mc2_choices": ["a"], "mc2_labels": [0]})


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("5 + 5 = 10\n#### 10", "10", "10"),
        ("#### -1,000.\nso 7", "-1000", "7"),
        ("it costs $1,234.50.", "[invalid]", "1234.50"),
        ("none", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_numbers_of_gsm8k(text, strict, flexible):
    assert (normal(first_marked(text)), normal(last_number(text))) == (strict, flexible)
    assert normal("so 5*2=<<5*2=10>>10\n#### 1,0") == "10"


def test_crows_pairs():
    task = get_task("crows_pairs")
    item = task.item(task.adapt({"sent_more": "a b", "sent_less": "c"}))
    assert item.pairs == (("", "a b"), ("", "c"))
    assert task.score(item, [Answer(-3.0), Answer(-5.0)]) == {
        "pct_stereotype": 1.0,
        "likelihood_diff": 2.0,
    }


def test_stereoset_weighs_tokens_and_reads_both_parts():
    task = get_task("stereoset")
    sentences = [
        {"sentence": word, "gold_label": label}
        for word, label in (("u", "unrelated"), ("s", "stereotype"), ("n", "anti-stereotype"))
    ]
    within = task.item(task.adapt({"context": "a BLANK", "sentences": sentences}))
    after = task.item(task.adapt({"context": "a", "sentences": sentences}))
    assert within.pairs == (("", "s"), ("", "n"), ("", "u"))
    assert after.pairs == (("a", " s"), ("a", " n"), ("a", " u"))
    answers = [Answer(-4.0, tokens=4), Answer(-3.0, tokens=2), Answer(-2.4, tokens=2)]
    assert task.score(within, answers) == {
        "lm_score": 0.5,
        "stereotype_score": 1.0,
        "lm_score_intrasentence": 0.5,
        "stereotype_score_intrasentence": 1.0,
    }
    with pytest.raises(EvaluationError, match="sentences are labelled"):
        task.adapt({"context": "a", "sentences": sentences[:2]})


@given(st.floats(0, 1), st.integers(1, 50), st.integers(0, 50))
def test_icat_is_best_without_preference(sense, count, stereotypes):
    [icat] = [m.aggregate for m in get_task("stereoset").metrics if m.name == "icat"]
    scores = [{"lm_score": sense, "stereotype_score": float(i < stereotypes)} for i in range(count)]
    assert 0 <= icat(scores) <= sense + 1e-12
    even = [{"lm_score": sense, "stereotype_score": i % 2} for i in range(2 * count)]
    assert icat(even) == pytest.approx(sense)


def winobias(text, group="pro"):
    task = get_task("winobias")
    return task.item(task.adapt({"set": group, "text": text}))


def test_winobias_asks_whom_the_pronoun_means():
    item = winobias("The clerk told the [the chief] that [she] met [her] aunt.")
    asked = 'The clerk told the chief that she met her aunt. In this sentence, "she" refers to'
    assert item.pairs == ((asked, " the chief"), (asked, " the clerk"))
    assert winobias("[The CEO] hired the construction worker as [he] grew.", "anti").pairs[1][
        1
    ] == (" the construction worker")
    assert len(OCCUPATIONS) == 40
    task = get_task("winobias")
    assert task.score(item, [Answer(-1.0), Answer(-2.0)]) == {"acc": 1.0, "acc_pro": 1.0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"set": "x", "text": "a"}, "set='x'; allowed: pro, anti"),
        ({"set": "pro", "text": "The chief hired the clerk."}, "no gold answer: one"),
        ({"set": "pro", "text": "[The chief] said [he] ran."}, ".* not one occupation"),
        ({"set": "pro", "text": "[The pilot] told the clerk [he] ran."}, "no gold answer: one"),
    ],
)
def test_winobias_refuses_rows_without_two_occupations(row, message):
    with pytest.raises(EvaluationError, match=f"winobias item 0: {message}"):
        adapted(get_task("winobias"), [row])


def test_the_gap_needs_both_parts():
    [gap] = [m.aggregate for m in get_task("winobias").metrics if m.name == "gap"]
    assert gap([{"acc_pro": 1.0}]) is None
    assert gap([{"acc_pro": 1.0}, {"acc_anti": 0.0}]) == 1.0


@pytest.mark.parametrize("value", [True, 1.5, 9, "x", [1]])
def test_a_gold_answer_is_the_number_of_a_choice(value):
    with pytest.raises(EvaluationError, match=r"gold answer .*, but there are 2 choices"):
        gold_of(value, ["a", "b"])


@pytest.mark.parametrize("value", ["", None, "E"])
def test_a_label_must_be_one_of_the_choices(value):
    with pytest.raises(EvaluationError, match="gold answer"):
        get_task("arc_easy").adapt({**ORIGINAL["arc_easy"], "answerKey": value})


def test_examples_are_drawn_from_the_group_or_at_random():
    pool = [Item(pairs=(), shot=f"s{i}", group="ab"[i % 2]) for i in range(6)]
    items = [Item(pairs=(("q", " a"),), group="b", description="D\n\n")]
    [first] = with_examples(get_task("mmlu"), items, pool, 2, 0)
    assert first.pairs == (("D\n\ns1\n\ns3\n\nq", " a"),)
    with pytest.raises(EvaluationError, match="mmlu item 0: num_fewshot=4, but there are 3 exa"):
        with_examples(get_task("mmlu"), items, pool, 4, 0)
    drawn = [with_examples(get_task("piqa"), items * 3, pool, 2, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_every_task_names_its_source():
    assert all(task.source and task.metrics for task in tasks().values())
    assert len(list_tasks()) == 15
