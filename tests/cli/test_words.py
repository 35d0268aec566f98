"""An error at the shell speaks of options, as the user typed them."""

from __future__ import annotations

import pytest

from tnlm.cli.words import in_options
from tnlm.errors import TnlmError

NAMES = ("calibration", "keep", "keep_targets", "tolerance", "metric", "rank", "ranks", "out_split")
NAMES += (
    "gauge",
    "max_length",
    "cache_dir",
    "targets",
    "ignore",
    "allocation",
    "in_split",
    "overwrite",
)
OPTIONS = {name: f"--{name.replace('_', '-')}" for name in NAMES} | {"formats": "--format"}


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("keep_targets=0.8; allowed: (0, 1]", "--keep-targets 0.8; allowed: (0, 1]"),
        ("pass calibration= (a file)", "pass --calibration (a file)"),
        ("metric='input' has no effect", "--metric input has no effect"),
        ("targets='.*(q|k)_proj'", "--targets '.*(q|k)_proj'"),
        ("out_split=(4, 8), in_split=(8, 4, 1); no", "--out-split 4,8, --in-split 8,4,1; no"),
        ("ranks=[3] or ranks=(3,)", "--ranks 3 or --ranks 3"),
        ("use max_length<=600 or more", "use --max-length of at most 600 or more"),
        ("gauge=False, not gauge=True", "--no-gauge, not --gauge"),
        ("formats= has 'x'", "--format has 'x'"),
        (
            "keep and keep_targets given; allowed: one of keep, keep_targets, tolerance",
            "--keep and --keep-targets given; allowed: one of --keep, --keep-targets, --tolerance",
        ),
        ("choose another, or pass overwrite=True", "choose another, or pass --overwrite"),
        ("leave them out of targets=.", "leave them out of --targets."),
        ("the model's: tokenizer=", "the model's: a tokenizer in MODEL"),
        ("(allow more: tolerance=)", "(allow more: --tolerance)"),
        ("candidates=0.5, hidden_keep=1", "candidates=0.5, hidden_keep=1"),
        ("in /data/keep=0.8/keep and rank/x", "in /data/keep=0.8/keep and rank/x"),
        (r"in C:\runs\keep=0.8\out and 'keep=0.8/x'", r"in C:\runs\keep=0.8\out and 'keep=0.8/x'"),
        ("of https://host/x?keep=3&rank=4", "of https://host/x?keep=3&rank=4"),
        ("targets='a', ignore=None.", "--targets a, no --ignore."),
        ('targets="a b"; no', "--targets 'a b'; no"),
        (r"targets='model\\.foo|x'", r"--targets 'model\.foo|x'"),
        ("ranks=[-1, 8], tolerance=(0.2, 0.5)", "--ranks -1,8, --tolerance 0.2,0.5"),
        ("Allowed: gauge, rank", "Allowed: --gauge, --rank"),
        ("'keep', 'rank'", "'keep', 'rank'"),
    ],
)
def test_arguments_become_options(said, shown):
    assert in_options(TnlmError(said, argument=[*OPTIONS, "tokenizer"]), OPTIONS) == shown


def test_what_is_no_option_or_is_not_named_stays():
    said = "the rank of a matrix"
    assert in_options(TnlmError(said, argument="keep"), OPTIONS) == said
    said = "pass keep= or keep_targets="
    assert in_options(TnlmError(said, argument="keep"), {}) == said
    assert in_options(TnlmError(said), OPTIONS) == said
    assert in_options(TnlmError(said, argument="keep"), OPTIONS) == "pass --keep or keep_targets="


def test_a_path_is_no_argument():
    said = "my runs/keep=0.8/x and keep=0.8 are not empty; pass overwrite=True"
    shown = "my runs/keep=0.8/x and keep=0.8 are not empty; pass --overwrite"
    assert in_options(TnlmError(said, argument="overwrite"), OPTIONS) == shown
