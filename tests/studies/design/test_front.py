from __future__ import annotations

import csv
import io

import pytest

from tnlm.errors import CheckpointError, OptionError
from tnlm.studies.design.configuration import DENSE, Configuration
from tnlm.studies.design.front import Front, Point


@pytest.fixture
def front():
    dense = Point(DENSE, 0.0, {"loss": 1.0, "speed": 1.0})
    points = [
        Point(Configuration((2, 3), ("q",)), 20.0, {"loss": 3.0, "speed": 4.0}),
        dense,
        Point(Configuration((1,), ("q", "k"), 2), 10.0, {"loss": 2.0, "speed": 0.5}),
        Point(Configuration((1,), ("q",)), 8.0, {"loss": 2.0, "speed": 2.0}),
    ]
    return Front.of(points, dense, ["speed"], {"layers 0": "'loss' is nan"})


def test_a_front_is_sorted_and_says_what_was_left_out(front):
    assert [point.percent for point in front.points] == [0.0, 8.0, 20.0]
    assert front.objectives == ("loss", "speed")
    assert front.maximize == ("speed",)
    text = str(front)
    assert "3 of 4 configurations are on the front" in text
    assert "failed: 1, e.g. 'loss' is nan" in text


def test_a_front_goes_through_files(front, tmp_path):
    assert Front.from_json(front.to_json()) == front
    front.save(tmp_path / "front.json")
    assert Front.from_json((tmp_path / "front.json").read_text()) == front
    front.save(tmp_path / "front.csv")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "front.csv").read_text())))
    assert [row["layers"] for row in rows] == ["", "1", "2 3"]
    assert [float(row["speed"]) for row in rows] == [1.0, 2.0, 4.0]
    with pytest.raises(CheckpointError, match="cannot be written"):
        front.save(tmp_path / "none" / "front.csv")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format_version": 1}', "front"])
def test_other_texts_are_not_fronts(text):
    with pytest.raises(OptionError, match="not a tnlm front"):
        Front.from_json(text)
    with pytest.raises(OptionError, match="does not have format_version 1"):
        Front.from_json('{"format_version": 2}')
