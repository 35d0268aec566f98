from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from tests.evaluation.made import rows
from tnlm import TnlmError
from tnlm.errors import EvaluationError, OptionError
from tnlm.evaluation import Evaluation, evaluate, perplexity
from tnlm.evaluation.tasks import get_task, list_tasks

STEREO = {"context": "word1 BLANK", "stereotype": "word1 word2", "antistereotype": "word1 word3"}
LOCAL = {
    "stereoset": [
        {**STEREO, "unrelated": "word1 word4 word5"},
        {**STEREO, "unrelated": "word1 word6", "context": "word7 word8"},
    ],
    "winobias": [
        {"set": name, "text": f"[The chief] hired the clerk because [{pronoun}] was busy."}
        for name, pronoun in (("pro", "he"), ("anti", "she"), ("pro", "he"))
    ],
    "perplexity": " ".join(f"word{i % 61}" for i in range(700)),
}


@pytest.fixture(scope="module")
def ask(tiny_llama, word_tokenizer):
    """Evaluate a tiny model on rows."""
    model = tiny_llama(max_position_embeddings=512)

    def run(task, made=None, **options):
        data = {task: made or LOCAL.get(task) or rows(task, 6)}
        rest = {"tokenizer": word_tokenizer, "num_fewshot": 0, "max_new_tokens": 4}
        if task == "perplexity":
            rest = {"tokenizer": word_tokenizer}
        return evaluate(model, task, **{"data": data, "progress": False, **rest, **options})

    return run


@pytest.mark.parametrize("task", list_tasks())
def test_every_task_runs_and_batches_do_not_matter(task, ask):
    found, again = ask(task), ask(task, batch_size=1)
    assert found[task].n >= 1
    assert {f.metric for f in found[task].figures} <= {m.name for m in get_task(task).metrics}
    for one, other in zip(found[task].figures, again[task].figures, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-5)
        assert math.isfinite(one.value)
    json.loads(found.to_json())


def test_perplexity_is_that_of_the_function(ask, tiny_llama, word_tokenizer, tmp_path):
    model, text = tiny_llama(max_position_embeddings=512), LOCAL["perplexity"]
    expected = perplexity(model, text, word_tokenizer, window=128)
    (tmp_path / "text.txt").write_text(text)
    rest = {"tokenizer": word_tokenizer, "window": 128, "progress": False}
    found = evaluate(model, text=tmp_path / "text.txt", **rest)
    assert asdict(found.perplexity) == pytest.approx(asdict(expected), rel=1e-12)
    assert found.scorer == "tnlm"
    assert (found["perplexity"].n, expected.windows) == (5, 5)
    assert found["perplexity"]["perplexity"].value == pytest.approx(expected.perplexity)
    assert evaluate(model, text=text, **rest) == found
    assert evaluate(model, "perplexity", data={"perplexity": text}, **rest) == found
    assert evaluate(model, text=text, windows=2, **rest)["perplexity"].n == 2
    assert str(expected) in str(found).splitlines()


def test_a_text_and_benchmarks_go_together(ask, tiny_llama):
    other = tiny_llama(seed=3, max_position_embeddings=512)
    found = ask("piqa", text=LOCAL["perplexity"], window=64, baseline=other)
    assert [result.task for result in found.results] == ["perplexity", "piqa"]
    figure = found["perplexity"]["perplexity"]
    assert figure.difference == pytest.approx(found.perplexity.perplexity - figure.baseline)
    assert figure.difference_stderr > 0
    assert found["piqa"].flips is not None
    assert found.scorer.startswith("lm-eval ")
    assert Evaluation.from_json(found.to_json()) == found
    assert json.loads(found.to_json())["perplexity"] == found.perplexity.perplexity


def test_likelihoods_are_sums_of_token_losses(tiny_llama, word_tokenizer, ask):
    model = tiny_llama(max_position_embeddings=512)
    [scores] = ask("lambada_openai", [{"text": "word1 word2 word3"}])["lambada_openai"].items
    ids = torch.tensor([word_tokenizer("word1 word2 word3")["input_ids"]])
    with torch.no_grad():
        loss = model(ids).logits[0, -2].double().log_softmax(-1)[ids[0, -1]]
    assert scores["loglikelihood"] == pytest.approx(float(loss), rel=1e-5)


def test_a_model_that_knows_one_answer_is_always_right(tiny_llama, word_tokenizer):
    model = tiny_llama(num_hidden_layers=1, tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    for layer in model.model.layers:  # hidden states are the embeddings, normalised
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(1.0)
        model.lm_head.weight[3 + 7] = 1.0  # whatever stands before, word7 follows
    made = [
        {"query": "word1", "choices": ["word7", "word2"], "gold": 0},
        {"query": "word1", "choices": ["word3", "word7"], "gold": 0},
    ]
    options = {"tokenizer": word_tokenizer, "progress": False}
    found = evaluate(model, "piqa", data={"piqa": made}, **options)
    assert [s["acc"] for s in found["piqa"].items] == [1.0, 0.0]
    told = [{"context": "word1", "target": f" word{i}"} for i in (7, 8)]
    found = evaluate(model, "lambada_openai", data={"lambada_openai": told}, **options)
    assert [s["acc"] for s in found["lambada_openai"].items] == [1.0, 0.0]
    sums = [{"question": "word1", "answer": f"so #### {i}"} for i in (7, 8)]
    options |= {"num_fewshot": 0, "max_new_tokens": 4}
    found = evaluate(model, "gsm8k", data={"gsm8k": sums}, **options)
    assert [s["exact_match_flexible"] for s in found["gsm8k"].items] == [1.0, 0.0]
    assert [s["exact_match_strict"] for s in found["gsm8k"].items] == [0.0, 0.0]


def test_a_baseline_is_a_model_or_an_earlier_evaluation(ask, tiny_llama):
    made = rows("piqa", 30)
    other = tiny_llama(seed=3, max_position_embeddings=512)
    first = ask("piqa", made)
    alike = ask("piqa", made, baseline=first)["piqa"]
    assert alike["acc"].difference == alike["acc"].difference_stderr == 0
    assert alike.flips.learned == alike.flips.unlearned == ()
    found = ask("piqa", made, baseline=other)["piqa"]
    assert found.flips.learned
    assert found["acc"].difference == pytest.approx(found["acc"].value - found["acc"].baseline)
    with pytest.raises(EvaluationError, match="piqa: the baseline answered other questions"):
        ask("piqa", made, baseline=first, limit=7)
    with pytest.raises(EvaluationError, match="'arc_easy' was not evaluated"):
        ask("arc_easy", baseline=first)
    with pytest.raises(EvaluationError, match=r"the baseline was scored by tnlm, not lm-eval "):
        ask("piqa", made, baseline=replace(first, scorer="tnlm"))


def test_a_bias_figure_has_a_paired_error(ask, tiny_llama):
    other = tiny_llama(seed=3, max_position_embeddings=512)
    made = LOCAL["winobias"] * 5
    gap = ask("winobias", made, baseline=other)["winobias"]["gap"]
    assert gap.stderr is not None
    assert gap.difference_stderr is not None


def test_a_limit_takes_both_parts_of_winobias(ask):
    found = ask("winobias", sorted(LOCAL["winobias"] * 3, key=lambda row: row["set"]), limit=4)
    assert sum("acc_pro" in scores for scores in found["winobias"].items) == 2
    only = ask("winobias", LOCAL["winobias"][:1])["winobias"]
    assert [figure.metric for figure in only.figures] == ["acc", "acc_pro"]


def test_the_model_is_left_as_it_was(tiny_llama, word_tokenizer):
    model = tiny_llama(attention_dropout=0.5).train()
    state = torch.get_rng_state()
    options = {"tokenizer": word_tokenizer, "progress": False, "data": {"piqa": rows("piqa", 3)}}
    first, second = (evaluate(model, "piqa", **options) for _ in range(2))
    assert first == second
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        model.model.embed_tokens.weight[3:] = float("nan")
    with pytest.raises(EvaluationError, match="piqa item 0: the log-likelihood is nan"):
        evaluate(model, "piqa", **options)
    assert model.training


def test_directories_hold_a_file_for_each_task(tmp_path, ask):
    for name in ("piqa_val", "mmlu_test", "mmlu_dev", "truthfulqa_mc"):
        task = "truthfulqa_mc2" if name.startswith("truth") else name.split("_")[0]
        text = "\n".join(json.dumps(row) for row in rows(task, 12))
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert ask("piqa", data=tmp_path)["piqa"].n == 12
    assert ask("truthfulqa_mc2", data=str(tmp_path), limit=5)["truthfulqa_mc2"].n == 5
    assert ask("mmlu", data=tmp_path, num_fewshot=2)["mmlu"].num_fewshot == 2
    with pytest.raises(EvaluationError, match=r"arc_easy: .* has none of arc_easy\.jsonl"):
        ask("arc_easy", data=tmp_path)
    with pytest.raises(EvaluationError, match="piqa: num_fewshot=1, but there are no rows to draw"):
        ask("piqa", data=tmp_path, num_fewshot=1)
    with pytest.raises(EvaluationError, match="is not a directory"):
        ask("piqa", data=tmp_path / "none")
    (tmp_path / "arc_easy.jsonl").write_text('{"query": ')
    with pytest.raises(EvaluationError, match=r"arc_easy\.jsonl:1: not valid JSON"):
        ask("arc_easy", data=tmp_path)


ROW = {"query": "word1", "choices": ["word2", "word3"], "gold": 0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"query": "word1", "gold": 0}, "piqa item 1: no column 'choices'; its columns are query"),
        ({**ROW, "gold": None}, "piqa item 1: no gold answer"),
        ({**ROW, "gold": -1}, "piqa item 1: no gold answer"),
        ({**ROW, "gold": 2}, "piqa item 1: gold answer 2, but there are 2 choices"),
        ({**ROW, "gold": "x"}, "piqa item 1: gold answer 'x'"),
        ({**ROW, "query": 3}, "piqa item 1: query must be text, got 3"),
        ({**ROW, "choices": ["a", ""]}, "piqa item 1: choices must be a list of texts"),
        ({"goal": "a", "sol1": "b"}, "piqa item 1: no column 'sol2'"),
        ({**ROW, "query": "\ud800"}, "piqa item 1: a column has the wrong type: 'utf-8' codec"),
        (["word1"], "piqa item 1: a row must map columns to values"),
    ],
)
def test_errors_name_the_item(bad, message, ask):
    with pytest.raises(EvaluationError, match=message):
        ask("piqa", [ROW, bad])


def test_an_item_with_a_choice_longer_than_the_window_is_skipped(ask, tiny_llama):
    long = {**ROW, "choices": ["word2", "word3 " * 20]}
    alone = ask("piqa", [ROW], max_length=10)["piqa"]
    found = ask("piqa", [long, ROW], max_length=10, baseline=tiny_llama(seed=3))
    result = Evaluation.from_json(found.to_json())["piqa"]
    assert (result.n, result.skipped, result.items) == (1, (0,), alone.items)
    flips = result.flips
    assert (*flips.learned, *flips.unlearned, *flips.right, *flips.wrong) == (1,)
    assert "piqa: 1 skipped, longer than the window" in str(found)
    with pytest.raises(EvaluationError, match="piqa: every item has a choice longer than"):
        ask("piqa", [long], max_length=10)


def test_a_long_prompt_is_cut_and_counted(ask):
    found = ask("piqa", [{**ROW, "query": "word1 " * 30}], max_length=10)
    assert found["piqa"].truncated == 2
    assert "piqa: 2 cut" in str(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit=0"),
        ({"num_fewshot": -1}, "num_fewshot=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 999}, "max_length=999, but the model has 512 positions"),
        ({"tokenizer": None}, "needs the model's tokenizer"),
        ({"data": {}}, "data has no entry 'piqa'"),
        ({"data": {"piqa": []}}, "piqa: no rows"),
        ({"data": None, "examples": {}}, "examples= needs data="),
    ],
)
def test_bad_options(options, message, ask):
    with pytest.raises(TnlmError, match=message):
        ask("piqa", **options)


def test_unknown_and_repeated_tasks(tiny_llama, word_tokenizer):
    with pytest.raises(OptionError, match="unknown task 'arc_eazy'; did you mean 'arc_easy'"):
        evaluate(tiny_llama(), "arc_eazy", tokenizer=word_tokenizer)
    with pytest.raises(OptionError, match=r"nothing to measure; pass tasks= or text="):
        evaluate(tiny_llama(), tokenizer=word_tokenizer)
    with pytest.raises(EvaluationError, match=r"perplexity needs a text; pass text="):
        evaluate(tiny_llama(), "perplexity", tokenizer=word_tokenizer)
    with pytest.raises(OptionError, match="limit= has no effect on a text"):
        evaluate(tiny_llama(), text="word1", tokenizer=word_tokenizer, limit=2)
    with pytest.raises(OptionError, match="data= has no effect on a text"):
        evaluate(tiny_llama(), text="word1", tokenizer=word_tokenizer, data={})
    with pytest.raises(OptionError, match="name each once"):
        evaluate(tiny_llama(), ["piqa", "piqa"], tokenizer=word_tokenizer)


def test_generation_needs_room(ask):
    with pytest.raises(EvaluationError, match="max_new_tokens=600 leaves no room"):
        ask("gsm8k", max_new_tokens=600)
    long = [{"question": "word1 " * 600, "answer": "#### 1"}]
    assert ask("gsm8k", long)["gsm8k"].truncated == 1


def test_foreign_tokens_and_models_without_logits(tiny_llama, tiny_bert, word_tokenizer):
    options = {"tokenizer": word_tokenizer, "data": {"piqa": [ROW]}, "progress": False}
    with pytest.raises(EvaluationError, match="piqa item 0: the tokenizer gives the id 5, but"):
        evaluate(tiny_llama(vocab_size=4), "piqa", **options)
    sums = {**options, "data": {"gsm8k": rows("gsm8k", 1)}, "num_fewshot": 0, "max_new_tokens": 2}
    with pytest.raises(EvaluationError, match="gsm8k item 0: the tokenizer gives the id"):
        evaluate(tiny_llama(vocab_size=2, eos_token_id=1), "gsm8k", **sums)
    with pytest.raises(EvaluationError, match="a BertModel predicts no next token"):
        evaluate(tiny_bert(), "piqa", **options)
    with pytest.raises(EvaluationError, match="an evaluation needs a causal language model"):
        evaluate(tiny_bert(), "gsm8k", **sums)
