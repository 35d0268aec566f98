"""GSM8K: school arithmetic word problems, answered by generated text."""

from __future__ import annotations

from tnlm.errors import EvaluationError
from tnlm.evaluation.tasks.base import Row, Task, TaskMetric
from tnlm.evaluation.tasks.columns import text_of

STRICT = r"#### (\-?[0-9\.\,]+)"
FLEXIBLE = r"(-?[$0-9.,]{2,})|(-?[0-9]+)"
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def adapt(row: Row) -> Row:
    """Read ``question``, and ``answer`` with the number after ``####``."""
    answer = text_of(row, "answer")
    if "####" not in answer:
        raise EvaluationError("no gold answer: 'answer' has no number after ####")
    return {"question": text_of(row, "question"), "answer": answer}


TASK = Task(
    name="gsm8k",
    source="Cobbe et al., arXiv 2110.14168; lm-eval gsm8k 3.0",
    metrics=(TaskMetric("exact_match_strict"), TaskMetric("exact_match_flexible")),
    adapt=adapt,
    config={
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "answer",
        "generation_kwargs": {
            "until": ["Question:", "</s>", "<|im_end|>"],
            "do_sample": False,
            "temperature": 0.0,
        },
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(IGNORED),
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
    online="gsm8k/gsm8k",
    num_fewshot=5,
    right="exact_match_flexible",
)
