"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepfs_tools.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("20G", 20 << 30),
        ("10TiB", 10 << 40),
        ("10 tb", 10 << 40),
        ("1.5k", 1536),
        ("1P", 1 << 50),
        ("7B", 7),
    ],
)
def test_sizes_are_read_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "20X", "1e9", "0.3", "1,5G", "²G"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no size|not a whole number"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (20 << 30, "20 GiB"), (1536, "1.5 KiB"), (1 << 50, "1 PiB")],
)
def test_sizes_are_shown_short(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 50))
def test_a_shown_size_is_a_size_near_the_right_one(size: int) -> None:
    shown = format_size(size)
    number, unit = shown.split()
    scale = 1024 ** "BKMGTP".index(unit[0])
    assert float(number) * scale == pytest.approx(size, rel=0.06)
    assert float(number) < 1024
