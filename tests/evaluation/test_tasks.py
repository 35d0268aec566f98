from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tnlm.errors import EvaluationError
from tnlm.evaluation import evaluate, lm_eval_tasks
from tnlm.evaluation.rows import adapted, example_rows
from tnlm.evaluation.tasks import (
    TASKS,
    Answer,
    Task,
    TaskMetric,
    get_task,
    list_tasks,
    multiple_choice,
    tasks,
)
from tnlm.evaluation.tasks.columns import gold_of, plain
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
def test_the_published_layouts_are_read(task, prompt, answer):
    context, continuation = requests(task, ORIGINAL[task])[1]
    assert (context.rpartition("\n\n")[2], continuation) == (prompt, answer)
    assert get_task(task).adapt(ORIGINAL[task])["gold"] == 1


def requests(task, row):
    """Return the contexts and continuations that lm-eval makes of one row."""
    tasks = pytest.importorskip("lm_eval.tasks")
    [config] = lm_eval_tasks([task], {task: [row]}, num_fewshot=0)
    [made] = tasks.TaskManager(include_defaults=False).load([config])["tasks"].values()
    made.build_all_requests()
    return [request.args for request in made.instances]


def test_truthfulqa_asks_after_six_examples_and_drops_empty_answers():
    row = {"query": "q", "choices": ["", "a", "b"], "gold": 2}
    asked = requests("truthfulqa_mc1", row)
    assert asked[0][0].count("Q: ") == 7
    assert asked[0][0].endswith("Spain.\n\nQ: q\nA:")
    assert [answer for _, answer in asked] == [" a", " b"]
    assert get_task("truthfulqa_mc1").adapt(row)["gold"] == 1


def test_truthfulqa_shares_probability():
    task = get_task("truthfulqa_mc2")
    row = {"question": "q", "mc2_targets": {"choices": ["a", "b", "c"], "labels": [1, 0, 1]}}
    answers = [Answer(math.log(p) - 2000) for p in (0.2, 0.5, 0.3)]  # far below the least float
    assert task.score(task.adapt(row), answers)["acc"] == pytest.approx(0.5)
    with pytest.raises(EvaluationError, match="no gold answer: labels must be 0 or 1"):
        task.adapt({"query": "q", "mc2_choices": ["a"], "mc2_labels": [0]})


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("5 + 5 = 10\n#### 10", 1, 1),
        ("#### 1,0.\nso 7", 1, 0),
        ("it costs $10.", 0, 1),
        ("none", 0, 0),
        ("", 0, 0),
    ],
)
def test_numbers_of_gsm8k(text, strict, flexible, tiny_llama, word_tokenizer, monkeypatch):
    module = pytest.importorskip("tnlm.evaluation.harness_model")
    monkeypatch.setattr(module.HarnessModel, "generate_until", lambda *_, **__: [text])
    row = {"question": "q", "answer": "so 5*2=<<5*2=10>>10\n#### 1,0"}
    options = {"tokenizer": word_tokenizer, "num_fewshot": 0, "progress": False}
    found = evaluate(tiny_llama(), "gsm8k", data={"gsm8k": [row]}, **options)["gsm8k"]
    assert found.items == ({"exact_match_strict": strict, "exact_match_flexible": flexible},)


def test_crows_pairs():
    row = {"sent_more": "a b", "sent_less": "c"}
    task = get_task("crows_pairs")
    assert requests("crows_pairs", row) == [("", "a b"), ("", "c")]
    assert task.score(task.adapt(row), [Answer(-3.0), Answer(-5.0)]) == {
        "pct_stereotype": 1.0,
        "likelihood_diff": 2.0,
    }
    with pytest.raises(EvaluationError, match="sentences must be a list of texts, none empty"):
        task.adapt({"sent_more": "", "sent_less": "c"})


def test_stereoset_weighs_tokens_and_reads_both_parts():
    task = get_task("stereoset")
    sentences = [
        {"sentence": word, "gold_label": label}
        for word, label in (("u", "unrelated"), ("s", "stereotype"), ("n", "anti-stereotype"))
    ]
    within, after = ({"context": c, "sentences": sentences} for c in ("a BLANK", "a"))
    assert requests("stereoset", within) == [("", "s"), ("", "n"), ("", "u")]
    assert requests("stereoset", after) == [("a", " s"), ("a", " n"), ("a", " u")]
    answers = [Answer(-4.0, tokens=4), Answer(-3.0, tokens=2), Answer(-2.4, tokens=2)]
    assert task.score(task.adapt(within), answers) == {
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


def test_winobias_asks_whom_the_pronoun_means():
    row = {"set": "pro", "text": "The clerk told the [the chief] that [she] met [her] aunt."}
    asked = 'The clerk told the chief that she met her aunt. In this sentence, "she" refers to'
    assert requests("winobias", row) == [(asked, " the chief"), (asked, " the clerk")]
    other = {"set": "anti", "text": "[The CEO] hired the construction worker as [he] grew."}
    assert requests("winobias", other)[1][1] == " the construction worker"
    assert len(OCCUPATIONS) == 40
    task = get_task("winobias")
    scores = task.score(task.adapt(row), [Answer(-1.0), Answer(-2.0)])
    assert scores == {"acc": 1.0, "acc_pro": 1.0}


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


def test_each_part_of_a_task_needs_enough_examples():
    task = get_task("mmlu")
    rows = [task.adapt({**ORIGINAL["mmlu"], "subject": name}) for name in "ab"]
    pool = [{**ORIGINAL["mmlu"], "subject": "aab"[i % 3]} for i in range(6)]
    assert len(example_rows(task, rows, 2, {}, {"mmlu": pool})) == 6
    with pytest.raises(EvaluationError, match="mmlu item 1: num_fewshot=3, but there are 2 exampl"):
        example_rows(task, rows, 3, {}, {"mmlu": pool})


def test_a_task_is_one_object(monkeypatch, tiny_llama, word_tokenizer):
    mine = Task(
        name="mine",
        source="none",
        metrics=(TaskMetric("margin"), TaskMetric("length")),
        adapt=plain,
        config=multiple_choice("word1 {{query}}"),
        score=lambda row, answers: {
            "margin": answers[row["gold"]].loglikelihood,
            "length": float(answers[0].tokens),
        },
        right="",
    )
    monkeypatch.setattr(TASKS, "_added", {"mine": mine})
    row = {"query": "word2", "choices": ["word3 word4", "word5"], "gold": 1}
    options = {"tokenizer": word_tokenizer, "progress": False}
    found = evaluate(tiny_llama(), "mine", data={"mine": [row]}, **options)["mine"]
    assert found["margin"].value == pytest.approx(math.log(1 / 64), abs=0.5)
    assert found["length"].value == 2
    assert requests("mine", row) == [("word1 word2", " word3 word4"), ("word1 word2", " word5")]


def test_every_task_names_its_source():
    assert all(task.source and task.metrics for task in tasks().values())
    assert len(list_tasks()) == 15
