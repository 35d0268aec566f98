"""Made-up rows of every task, in words that the test tokenizer knows, and in other ones."""

from __future__ import annotations

import random
from typing import Any

WORDS = [f"word{i}" for i in range(61)]


def words(draws: random.Random, least: int, most: int) -> str:
    return " ".join(draws.choices(WORDS, k=draws.randint(least, most)))


def choices(draws: random.Random, count: int) -> dict[str, Any]:
    texts = [words(draws, 1, 4) for _ in range(count)]
    return {"query": words(draws, 3, 9), "choices": texts, "gold": draws.randrange(count)}


def row(task: str, draws: random.Random) -> dict[str, Any]:
    """Make a row of a task in the layout of local files."""
    query = words(draws, 4, 9)
    match task:
        case "winogrande":
            found = choices(draws, 2)
            return {**found, "query": f"{query} _ {words(draws, 1, 5)}"}
        case "piqa":
            return choices(draws, 2)
        case "mmlu":
            return {**choices(draws, 4), "subject": draws.choice(["high_word1", "word2"])}
        case "truthfulqa_mc1":
            return {**choices(draws, 3), "gold": 0}
        case "truthfulqa_mc2":
            texts = [words(draws, 1, 4) for _ in range(4)]
            return {"query": query, "mc2_choices": texts, "mc2_labels": [1, 1, 0, 0]}
        case "lambada_openai":
            return {"context": query, "target": " " + draws.choice(WORDS)}
        case "gsm8k":
            return {"question": query, "answer": f"{words(draws, 1, 3)} #### {draws.randint(0, 4)}"}
        case "crows_pairs":
            return {"sent_more": query, "sent_less": words(draws, 4, 9)}
        case _:
            return choices(draws, 4)


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    draws = random.Random(f"{task} {seed}")
    return [row(task, draws) for _ in range(count)]


def published(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """Bring a made-up row to the layout of the published data set, as lm-eval fetches it."""
    query, texts, gold = (row.get(name) for name in ("query", "choices", "gold"))
    labelled = {"text": texts, "label": list("ABCD")[: len(texts or ())]}
    match task:
        case "arc_easy" | "arc_challenge":
            return {"question": query, "choices": labelled, "answerKey": "ABCD"[gold]}
        case "openbookqa":
            return {"question_stem": query, "choices": labelled, "answerKey": "ABCD"[gold]}
        case "piqa":
            return {"goal": query, "sol1": texts[0], "sol2": texts[1], "label": gold}
        case "hellaswag":
            words = {"activity_label": "word1 [x]", "ctx_a": query, "ctx_b": "word2 [title] word3"}
            return {**words, "endings": texts, "label": str(gold)}
        case "winogrande":
            options = {"option1": texts[0], "option2": texts[1]}
            return {"sentence": query, **options, "answer": str(gold + 1)}
        case "mmlu":
            return {"question": query, "choices": texts, "answer": gold, "subject": row["subject"]}
        case "truthfulqa_mc1":
            return {"question": query, "mc1_targets": {"choices": texts, "labels": [1, 0, 0]}}
        case "truthfulqa_mc2":
            targets = {"choices": row["mc2_choices"], "labels": row["mc2_labels"]}
            return {
                "question": query,
                "mc1_targets": {"choices": row["mc2_choices"], "labels": [1, 0, 0, 0]},
                "mc2_targets": targets,
            }
        case "lambada_openai":
            return {"text": row["context"] + row["target"]}
        case _:
            return row
