from __future__ import annotations

import logging

import pytest

import tnlm
from tnlm.errors import OptionError


def test_widths_are_multiples_and_the_rest_stays_dense(tiny_llama):
    model = tiny_llama(intermediate_size=128)
    decided = tnlm.plan(
        model,
        "auto",
        keep_targets=0.7,
        calibration=[list(range(16))] * 4,
        portable="llama.cpp",
        multiple=16,
        progress=False,
    )
    assert {layer.format for layer in decided.layers} <= {"channels", None}
    widths = [layer.spec["width"] for layer in decided.layers if layer.format]
    assert widths
    assert all(width % 16 == 0 for width in widths)
    assert decided.request["portable"] == "llama.cpp"


def test_without_data_the_model_writes_its_own_text(tiny_llama, caplog):
    asked = {"keep_targets": 0.8, "portable": "llama.cpp", "num_samples": 4, "max_length": 16}
    with caplog.at_level(logging.WARNING, "tnlm"):
        found = tnlm.plan(tiny_llama(), "auto", progress=False, **asked)
    assert "portable='llama.cpp' without calibration=: the model writes its own text" in caplog.text
    expected = tnlm.plan(tiny_llama(), "auto", calibration="self", progress=False, **asked)
    assert found.to_json() == expected.to_json()


def test_a_budget_object_holds_it_as_well(tiny_llama):
    decided = tnlm.plan(
        tiny_llama(intermediate_size=128),
        "modegpt",
        calibration=[list(range(16))] * 4,
        budget=tnlm.Budget(keep_targets=0.8, portable="transformers"),
        progress=False,
    )
    assert {layer.format for layer in decided.layers} == {"channels", None}


@pytest.mark.parametrize(
    ("scheme", "portable", "message"),
    [
        (
            "svd",
            "llama.cpp",
            "does not execute low-rank; allowed schemes: auto, auto-corrected, modegpt",
        ),
        ("auto", "llama-cpp", "unknown runtime 'llama-cpp'; did you mean 'llama.cpp'"),
    ],
)
def test_what_a_runtime_does_not_execute_is_refused(tiny_llama, scheme, portable, message):
    with pytest.raises(OptionError, match=message):
        tnlm.compress(tiny_llama(), scheme, portable=portable)


def test_a_width_off_the_multiple_is_refused(tiny_llama):
    with pytest.raises(OptionError, match="width=40; allowed: multiples of 32"):
        tnlm.compress(
            tiny_llama(intermediate_size=64),
            "modegpt",
            width=40,
            calibration=[list(range(16))] * 4,
            portable="llama.cpp",
            progress=False,
        )
