from __future__ import annotations

import pytest

from tnlm.errors import OptionError
from tnlm.streaming.size import bytes_of, in_words


@pytest.mark.parametrize(
    ("text", "size"),
    [("6GB", 6 * 10**9), ("6 gib", 6 * 2**30), ("2.5M", 2_500_000), (7, 7), ("7", 7), (7.0, 7)],
)
def test_sizes_are_read(text, size):
    assert bytes_of(text, "memory") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", 0, True, "6 lorries", "1e9", None])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(OptionError, match="memory=") as caught:
        bytes_of(text, "memory")
    assert caught.value.arguments == ("memory",)


def test_words_are_never_less_than_the_size():
    for size in (1, 10**6, 10**6 + 1, 999_999_999, 10**9 + 1, 123 * 10**9):
        assert bytes_of(in_words(size), "memory") >= size
