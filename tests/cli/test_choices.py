"""What is typed, as keywords of `tnlm.compress`."""

from __future__ import annotations

import pytest

from tnlm.cli.choices import asked
from tnlm.errors import OptionError


@pytest.mark.parametrize(
    "item", ["progress=true", 'scheme="kron"', "model=1", "targets=1", "tokenizer=1", "keep=2"]
)
def test_set_gives_options_of_formats_only(item):
    with pytest.raises(OptionError, match=f"--set {item}"):
        asked({"set_": [item]})


def test_set_does_not_override_an_option():
    with pytest.raises(OptionError, match="'rank' is given elsewhere"):
        asked({"rank": 3, "set_": ["rank=4"]})
