"""Our tasks on local rows beside lm-evaluation-harness' own definitions of the same tasks."""

from __future__ import annotations

import logging
import random
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.evaluation.made import published, rows
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import evaluate, lm_eval_tasks
from tnlm.evaluation.tasks import get_task, list_tasks

pytest.importorskip("lm_eval")
ONLINE = [name for name in list_tasks() if get_task(name).online]
COUNT = 30


@pytest.fixture(scope="module")
def model(tiny_llama):
    """Make a model whose answers differ: larger weights than at the start of training."""
    made = tiny_llama(max_position_embeddings=256)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6)
    return made


@pytest.fixture(scope="module")
def starting_tokenizer():
    """Make a tokenizer that puts <s> before every text, and whose words hold their space."""
    vocab = {"<pad>": 0, "<unk>": 1, "<s>": 2}
    vocab |= {
        f"{space}word{i}": 3 + 2 * i + (space == "") for i in range(61) for space in ("", "▁")
    }
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Metaspace(prepend_scheme="never")
    backend.decoder = MetaspaceDecoder(prepend_scheme="never")
    backend.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 2)]
    )
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def hub(monkeypatch):
    """Let lm-eval fetch made-up rows of a task; return the test rows and the training rows."""

    def serve(task, count=COUNT):
        given, pool = [], []

        def load_dataset(path, name=None, **_):
            sizes = {"test": 1 if task == "mmlu" else count, "train": 4}
            found = {split: rows(task, n, seed=f"{name} {split}") for split, n in sizes.items()}
            if task == "mmlu":
                found = {s: [{**row, "subject": name} for row in r] for s, r in found.items()}
            tests, shots = ([published(task, row) for row in part] for part in found.values())
            given.extend(tests)
            pool.extend(shots)
            asked, drawn = Dataset.from_list(tests), Dataset.from_list(shots)
            return {"test": asked, "validation": asked, "train": drawn, "dev": drawn}

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return given, pool

    return serve


@pytest.mark.parametrize("task", ONLINE)
def test_local_rows_are_asked_and_scored_as_lm_eval_does_itself(task, model, word_tokenizer, hub):
    given, pool = hub(task)
    shots = 2 if task in ("arc_easy", "gsm8k", "mmlu") else 0
    shared = {"tokenizer": word_tokenizer, "progress": False, "max_new_tokens": 6, "seed": 7}
    theirs = evaluate(model, task, num_fewshot=shots, **shared)[task]
    local = {"data": {task: given}, "examples": {task: pool}}
    ours = evaluate(model, task, num_fewshot=shots, **local, **shared)[task]
    assert ours.n == len(given)
    assert ours.digest == theirs.digest  # contexts with examples, continuations and targets
    for mine, other in zip(ours.items, theirs.items, strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    assert [figure.metric for figure in ours.figures] == [m.name for m in get_task(task).metrics]
    right = get_task(task).right
    if right and task not in ("gsm8k", "lambada_openai"):  # a random model never answers those
        assert 0.05 < ours[right].value < 0.95


def test_examples_hold_their_answers_where_the_choice_comes_first(model, word_tokenizer, hub):
    """Of one item: lm-eval draws and drops an example more where a data set has no test split."""
    given, pool = hub("winogrande", count=1)
    shared = {"tokenizer": word_tokenizer, "progress": False, "num_fewshot": 2}
    theirs = evaluate(model, "winogrande", **shared)["winogrande"]
    local = {"data": {"winogrande": given}, "examples": {"winogrande": pool}}
    assert evaluate(model, "winogrande", **local, **shared)["winogrande"].digest == theirs.digest


@pytest.mark.parametrize("task", ["arc_easy", "hellaswag", "lambada_openai", "crows_pairs"])
def test_likelihoods_are_sums_over_tokens(task, tiny_llama, starting_tokenizer):
    """Whatever stands in a batch, and although a context's last spaces move on."""
    model = tiny_llama(vocab_size=128, max_position_embeddings=256)
    made = rows(task, 12)
    for row in made:
        row.update({name: row[name] + "  " for name in ("query", "context") if name in row})
    options = {"tokenizer": starting_tokenizer, "data": {task: made}, "progress": False}
    ours, alone = (evaluate(model, task, batch_size=size, **options)[task] for size in (5, 1))
    for mine, other in zip(ours.items, alone.items, strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    if task == "lambada_openai":
        ids = torch.tensor(
            [starting_tokenizer(made[0]["context"] + made[0]["target"])["input_ids"]]
        )
        count = len(starting_tokenizer(made[0]["context"].rstrip())["input_ids"])
        with torch.no_grad():
            logits = model(ids).logits[0, count - 1 : -1].log_softmax(-1)
        expected = logits.gather(-1, ids[0, count:, None]).sum()
        assert ours.items[0]["loglikelihood"] == pytest.approx(float(expected), rel=1e-5)


def test_lm_eval_leaves_everything_as_it_was(tiny_llama, word_tokenizer, capfd):
    model = tiny_llama(max_position_embeddings=256, tie_word_embeddings=True, attention_dropout=0.5)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 2)  # untied since
    model.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    before = {name: value.clone() for name, value in model.state_dict().items()}
    level = logging.getLogger("lm_eval").level
    pad = word_tokenizer.padding_side, word_tokenizer.pad_token
    options = {"tokenizer": word_tokenizer, "data": {"piqa": rows("piqa", 5)}, "progress": False}
    first, second = (evaluate(model, "piqa", **options) for _ in range(2))
    assert first == second
    assert model.training
    assert "tie_weights" not in vars(model)
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (word_tokenizer.padding_side, word_tokenizer.pad_token) == pad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert logging.getLogger("lm_eval").level == level
    assert capfd.readouterr() == ("", "")


def test_without_data_an_offline_machine_says_so(model, word_tokenizer, monkeypatch):
    def fetch(**_):
        raise ConnectionError("no route")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    with pytest.raises(EvaluationError, match="gsm8k: lm-eval cannot get its data: no route"):
        evaluate(model, "gsm8k", tokenizer=word_tokenizer, limit=3, progress=False)


def test_a_missing_lm_eval_names_the_extra(model, word_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(OptionError, match=r"not installed; pip install 'tnlm\[eval\]'"):
        evaluate(model, "piqa", tokenizer=word_tokenizer, data={"piqa": rows("piqa", 2)})


@pytest.mark.parametrize("task", ["stereoset", "winobias"])
def test_tasks_that_lm_eval_lacks_need_data(task, model, word_tokenizer):
    with pytest.raises(EvaluationError, match=f"lm-eval has no task like {task}; give data="):
        evaluate(model, task, tokenizer=word_tokenizer)


def test_configurations_for_runs_of_lm_eval_itself(model, word_tokenizer):
    made = rows("mmlu", 10)
    found = lm_eval_tasks(["mmlu", "piqa"], {"mmlu": made, "piqa": rows("piqa", 3)}, limit=6)
    subjects = dict.fromkeys(row["subject"] for row in made)
    assert [config["task"] for config in found] == [*(f"mmlu_{name}" for name in subjects), "piqa"]
    sizes = [len(config["custom_dataset"]()["test"]) for config in found]
    assert (sum(sizes[:-1]), sizes[-1]) == (6, 3)
    with pytest.raises(EvaluationError, match="num_fewshot=5, but there are no rows to draw"):
        lm_eval_tasks(["gsm8k"], {"gsm8k": rows("gsm8k", 2)})
    with pytest.raises(EvaluationError, match=r"measured by tnlm\.perplexity, not by lm-eval"):
        lm_eval_tasks(["perplexity"], {})
