"""Grids: their names, their bytes, and what they refuse."""

import pytest

from tnlm.errors import OptionError
from tnlm.precision.grid import Precision, least_bytes, precision_of


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_name_gives_its_bits(bits):
    assert precision_of(f"int{bits}").bits == bits
    assert precision_of(f"int{bits}").name == f"int{bits}"


def test_int8_has_one_scale_a_row_unless_asked():
    assert precision_of("int8").group is None
    assert precision_of("int8", group=32).group == 32


@pytest.mark.parametrize("name", ["int1", "int9", "fp8", "INT4", "", 4, None])
def test_unknown_names_are_refused(name):
    with pytest.raises(OptionError, match="int2 to int8"):
        precision_of(name)


@pytest.mark.parametrize("group", [0, 7, -64, 2.5, True])
def test_bad_groups_are_refused(group):
    with pytest.raises(OptionError, match="8 columns or more"):
        precision_of("int4", group=group)


def test_bytes_count_codes_scales_and_zeros():
    assert Precision(4).bytes(3, 64, 2) == 3 * (32 + 2)
    assert Precision(4).bytes(3, 65, 2) == 3 * (36 + 2 * 2)  # the last group is shorter
    assert Precision(4, 64, symmetric=False).bytes(3, 64, 2) == 3 * (32 + 3)
    assert Precision(3, None).bytes(3, 64, 4) == 3 * (24 + 4)


def test_what_packing_would_enlarge_stays():
    assert not Precision(8, None).saves(10, 1, 2)
    assert least_bytes([(10, 1)], Precision(8, None), 2) == 20
