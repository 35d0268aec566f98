from __future__ import annotations

from types import SimpleNamespace

import pytest

from tnlm.errors import OptionError
from tnlm.utils.registry import Registry


@pytest.fixture
def schemes():
    return Registry("tnlm.schemes", "SCHEME", "scheme")


def test_what_is_added_is_found_and_removed_again(schemes):
    before = schemes.all()
    schemes.add(SimpleNamespace(name="aa-first"))
    assert list(schemes.all()) == ["aa-first", *before]
    schemes.remove("aa-first")
    assert schemes.all() == before


@pytest.mark.parametrize(
    ("name", "said"), [("svd", "exists already"), ("", "non-empty string"), (3, "non-empty string")]
)
def test_a_name_that_cannot_be_is_refused(schemes, name, said):
    with pytest.raises(OptionError, match=said):
        schemes.add(SimpleNamespace(name=name))


def test_only_what_was_added_is_removed(schemes):
    with pytest.raises(OptionError, match="no scheme 'svd' was added"):
        schemes.remove("svd")


@pytest.mark.parametrize("name", ["svdd", ["svd"], None])
def test_an_unknown_name_is_refused_with_the_known_ones(schemes, name):
    with pytest.raises(OptionError, match=r"unknown scheme .*Allowed: .*svd-llm"):
        schemes.get(name)
