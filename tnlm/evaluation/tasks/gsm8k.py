"""GSM8K: school arithmetic in words, answered by generated text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import Answer, Item, Metric, Row, Scores, Task, text_of

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
UNTIL = ("Question:", "</s>", "<|im_end|>")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def adapt(row: Row) -> Row:
    """Read ``question``, and ``answer`` with the number after ``####``."""
    answer = text_of(row, "answer")
    if "####" not in answer:
        raise EvaluationError("no gold answer: 'answer' has no number after ####")
    return {"question": text_of(row, "question"), "answer": answer}


def item(row: Row) -> Item:
    """Ask the question; whatever is generated after it is read."""
    prompt = f"Question: {row['question']}\nAnswer:"
    return Item(pairs=((prompt, ""),), shot=f"{prompt} {row['answer']}", answer=row["answer"])


def first_marked(text: str) -> str:
    """Return the number after the first ``####``.

    Example:
        >>> first_marked("2 + 3 = 5 #### 5 and 7")
        '5'
    """
    found = re.search(STRICT, text)
    return found.group(1).strip() if found else "[invalid]"


def last_number(text: str) -> str:
    """Return the last number of a text, wherever it stands.

    Example:
        >>> last_number("5 apples cost $10 in all.")
        '$10'
    """
    found = re.findall(FLEXIBLE, text)
    return next(part for part in found[-1] if part).strip() if found else "[invalid]"


def normal(answer: str) -> str:
    """Drop commas, dollar signs, a working before ``####`` and a final point."""
    for pattern in _IGNORED:
        answer = re.sub(pattern, "", answer)
    return answer.lower()


def score(item: Item, answers: Sequence[Answer]) -> Scores:
    """Compare the marked number (strict) and the last number (flexible) with the answer's."""
    text, gold = answers[0].text, normal(item.answer)
    return {
        "exact_match_strict": float(normal(first_marked(text)) == gold),
        "exact_match_flexible": float(normal(last_number(text)) == gold),
    }


TASK = Task(
    name="gsm8k",
    source="Cobbe et al., arXiv 2110.14168; lm-eval gsm8k 3.0",
    metrics=(Metric("exact_match_strict"), Metric("exact_match_flexible")),
    adapt=adapt,
    item=item,
    score=score,
    kind="generation",
    online="gsm8k",
    harness={
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(_IGNORED),
            }
        ],
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [
                    {"function": "regex", "regex_pattern": STRICT},
                    {"function": "take_first"},
                ],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": FLEXIBLE},
                    {"function": "take_first"},
                ],
            },
        ],
    },
    num_fewshot=5,
    right="exact_match_flexible",
    until=UNTIL,
)
