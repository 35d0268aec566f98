from __future__ import annotations

import pickle

import pytest

from tnlm import errors
from tnlm.errors import CheckpointError, OptionError, TnlmError, did_you_mean

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", [each for each in KINDS if issubclass(each, TnlmError)])
def test_errors_are_pickled_with_their_arguments(kind):
    error = pickle.loads(pickle.dumps(kind("keep=2", argument=("keep", "rank"))))
    assert (type(error), str(error), error.arguments) == (kind, "keep=2", ("keep", "rank"))


def test_an_error_is_one_of_python_too():
    assert issubclass(OptionError, ValueError)
    assert issubclass(CheckpointError, OSError)
    assert OptionError("keep=2", argument="keep").arguments == ("keep",)
    assert CheckpointError("a file").arguments == ()


def test_hints_come_from_names_that_are_not_listed_too():
    assert did_you_mean("kron", []) == ". Allowed: none"
    assert did_you_mean("targts", ["svd"], ["targets"]) == "; did you mean 'targets'? Allowed: svd"
