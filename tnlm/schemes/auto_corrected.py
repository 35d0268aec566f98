"""auto-corrected: auto, then a correction of all factors towards the dense model's predictions."""

from dataclasses import replace

from tnlm.schemes.auto import SCHEME as AUTO

SCHEME = replace(
    AUTO,
    name="auto-corrected",
    title="auto, then its factors corrected towards the dense model's predictions; no labels",
    recover="correct",
    source="tnlm; auto, then KL to the dense predictions through merged LoRAs",
)
