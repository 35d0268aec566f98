from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.evaluation.made import rows
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import evaluate, harness, lm_eval_tasks
from tnlm.evaluation.generation import generate
from tnlm.evaluation.tasks import get_task, list_tasks
from tnlm.evaluation.tasks.gsm8k import last_number

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval"
)
ONLINE = [name for name in list_tasks() if get_task(name).online]
COUNT = 52


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import lm-eval once, whose dependencies warn of their own."""
    if importlib.util.find_spec("lm_eval") is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("lm_eval.models.huggingface")


@pytest.fixture(scope="module")
def model(tiny_llama):
    """Make a model whose answers differ: larger weights than at the start of training."""
    made = tiny_llama(max_position_embeddings=256)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(6)
    return made


def planted(task, model, tokenizer):
    """Make rows of a task; of those that a random model never answers, let it know a third."""
    made = rows(task, COUNT)
    if task == "lambada_openai":
        for row in made[::3]:
            ids = torch.tensor([tokenizer(row["context"])["input_ids"]])
            with torch.no_grad():
                row["target"] = " " + tokenizer.decode(model(ids).logits[0, -1].argmax())
    if task == "gsm8k":
        prompts = [get_task(task).item(row).pairs[0][0] for row in made]
        texts = generate(
            model, tokenizer, prompts, prompts, until=(), window=99, max_new_tokens=6, batch_size=8
        )
        for row, answer in list(zip(made, texts, strict=True))[::3]:
            row["answer"] = f"so #### {last_number(answer.text)}"
    return made


@needs_lm_eval
@pytest.mark.parametrize("task", ONLINE)
def test_lm_eval_gives_the_same_scores_of_every_item(task, model, word_tokenizer):
    options = {
        "tokenizer": word_tokenizer,
        "data": {task: planted(task, model, word_tokenizer)},
        "num_fewshot": 0,
        "max_new_tokens": 6,
        "progress": False,
    }
    ours, theirs = evaluate(model, task, **options), harness(model, [task], **options)
    assert ours[task].n == theirs[task].n == COUNT
    for mine, other in zip(ours[task].figures, theirs[task].figures, strict=True):
        exact = mine.metric.startswith(("acc", "exact", "pct")) and task != "truthfulqa_mc2"
        assert mine.metric == other.metric
        assert mine.value == (other.value if exact else pytest.approx(other.value, rel=1e-4))
    right = get_task(task).right
    if right:
        assert 0.05 < ours[task][right].value < 0.95
        assert [s[right] for s in ours[task].items] == [s[right] for s in theirs[task].items]


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


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "trailing"),
    [("arc_easy", ""), ("hellaswag", "  "), ("lambada_openai", "  "), ("crows_pairs", "")],
)
def test_the_split_into_tokens_is_lm_evals(task, trailing, tiny_llama, starting_tokenizer):
    model = tiny_llama(vocab_size=128, max_position_embeddings=256)
    made = rows(task, 50)
    for row in made:
        row.update({name: row[name] + trailing for name in ("query", "context") if name in row})
    options = {"tokenizer": starting_tokenizer, "data": {task: made}, "progress": False}
    ours, theirs = evaluate(model, task, **options), harness(model, [task], **options)
    for mine, other in zip(ours[task].figures, theirs[task].figures, strict=True):
        assert mine.value == pytest.approx(other.value, rel=1e-5)


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "shots", "max_length"),
    [("arc_easy", 3, 40), ("mmlu", 2, None), ("winogrande", 1, None)],
)
def test_examples_and_truncation_are_lm_evals(task, shots, max_length, model, word_tokenizer):
    options = {
        "tokenizer": word_tokenizer,
        "data": {task: rows(task, 50)},
        "examples": {task: rows(task, 20, seed=1)},
        "num_fewshot": shots,
        "max_length": max_length,
        "progress": False,
    }
    ours, theirs = evaluate(model, task, **options), harness(model, [task], **options)
    assert [s["acc"] for s in ours[task].items] == [s["acc"] for s in theirs[task].items]
    assert (ours[task].truncated > 0) == (max_length is not None)


@needs_lm_eval
def test_a_baseline_scored_by_lm_eval_is_compared(model, tiny_llama, word_tokenizer, monkeypatch):
    rest = {"tokenizer": word_tokenizer, "data": {"piqa": rows("piqa", 20)}, "progress": False}
    other = harness(tiny_llama(seed=1, max_position_embeddings=256), ["piqa"], **rest)
    with pytest.raises(EvaluationError, match=r"the baseline was scored by lm-eval .*, not tnlm"):
        evaluate(model, "piqa", baseline=other, **rest)


@needs_lm_eval
def test_lm_eval_leaves_everything_as_it_was(model, word_tokenizer):
    model.train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    pad = word_tokenizer.padding_side, word_tokenizer.pad_token
    harness(
        model,
        ["piqa"],
        tokenizer=word_tokenizer,
        data={"piqa": rows("piqa", 5)},
        progress=False,
    )
    assert model.training
    model.eval()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (word_tokenizer.padding_side, word_tokenizer.pad_token) == pad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@needs_lm_eval
def test_without_data_lm_eval_fetches_and_an_offline_machine_says_so(
    model, word_tokenizer, monkeypatch
):
    lm_eval = importlib.import_module("lm_eval")
    asked = []

    def fetch(**request):
        asked.append(request)
        raise ConnectionError("no route")

    monkeypatch.setattr(lm_eval, "simple_evaluate", fetch)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_defaults: include_defaults)
    with pytest.raises(EvaluationError, match="gsm8k: lm-eval cannot get its data: no route"):
        evaluate(
            model, "gsm8k", tokenizer=word_tokenizer, limit=3, max_new_tokens=7, progress=False
        )
    [request] = asked
    assert request["tasks"] == ["gsm8k"]
    assert (request["limit"], request["num_fewshot"]) == (3, 5)
    assert request["gen_kwargs"] == {"max_gen_toks": 7}


def test_a_missing_lm_eval_names_the_extra(model, word_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(OptionError, match=r"pip install 'tnlm\[eval\]'"):
        evaluate(model, "piqa", tokenizer=word_tokenizer)


@pytest.mark.parametrize("task", ["stereoset", "winobias", "perplexity"])
def test_tasks_that_lm_eval_lacks_need_data(task, tmp_path):
    with pytest.raises(EvaluationError, match=f"lm-eval has no task like {task}"):
        lm_eval_tasks([task], {}, tmp_path)


def test_configurations_of_local_rows(tmp_path):
    made = rows("mmlu", 10)
    configs = lm_eval_tasks(["mmlu"], {"mmlu": made}, tmp_path)
    subjects = dict.fromkeys(row["subject"] for row in made)
    assert [config["task"] for config in configs] == [f"tnlm_mmlu_{name}" for name in subjects]
    files = [config["dataset_kwargs"]["data_files"]["test"] for config in configs]
    assert sum(len(Path(file).read_text().splitlines()) for file in files) == 10
    with pytest.raises(EvaluationError, match="num_fewshot=5, but there are no example rows"):
        lm_eval_tasks(["gsm8k"], {"gsm8k": rows("gsm8k", 2)}, tmp_path)
