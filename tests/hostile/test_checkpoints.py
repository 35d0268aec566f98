"""Broken checkpoints are refused or load as they were; what only a sum can know, verify finds."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest

from tests.hostile.bases import BASES, make
from tests.hostile.cases import cases, sample
from tests.hostile.running import faults, run
from tests.hostile.worker import outcome

FEW = {"low-rank", "tied"}


def test_there_are_enough_and_no_two_alike():
    found = [case.id for case in cases()]
    assert len(found) == len(set(found)) >= 600


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    made = tmp_path_factory.mktemp("bases")
    make(made, sorted(FEW))
    return made


def test_a_sample_of_broken_checkpoints(root, tmp_path):
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as users have it: a warning is no answer
        for case in sample(40, FEW):
            case.make(root, tmp_path / case.id)
            found.append({"case": case, **outcome(case, root, tmp_path / case.id)})
    assert not faults(found)
    assert not list(tmp_path.rglob("exploded"))
    assert Counter(one["outcome"] for one in found)["refused"] > 20


@pytest.mark.hostile
@pytest.mark.parametrize("base", BASES)
def test_every_broken_checkpoint(base, tmp_path):
    make(tmp_path, [base])
    assert not faults(run([case for case in cases() if case.base == base], tmp_path))
