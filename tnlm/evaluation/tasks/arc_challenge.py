"""ARC-Challenge: questions of ARC that simple word statistics do not answer."""

from __future__ import annotations

from dataclasses import replace

from tnlm.evaluation.tasks.arc_easy import TASK as EASY

TASK = replace(
    EASY,
    name="arc_challenge",
    source="Clark et al., arXiv 1803.05457; lm-eval arc_challenge 1.0",
    online="arc/arc_challenge",
)
