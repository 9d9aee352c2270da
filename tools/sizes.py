"""Sizes as people write and read them: 20G, 1.5 TiB."""

from __future__ import annotations

import re

_UNITS = "KMGTP"
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTP])(i?B)?|B)?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Give bytes for `20G`, `10TiB`, `512`, `1.5t`; units are powers of 1024, as in qemu-img.

    Raises:
        ValueError: no size, or not a whole number of bytes; the text is for people.
    """
    match = _PATTERN.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no size: write it like 20G or 10TiB")
    number, unit = match[1], match[2]
    scale = 1024 ** (_UNITS.index(unit.upper()) + 1) if unit else 1
    size = float(number) * scale if "." in number else int(number) * scale
    if size != int(size):
        raise ValueError(f"{text!r} is not a whole number of bytes")
    return int(size)


def format_size(size_bytes: float) -> str:
    """Give `20 GiB`, `1.5 TiB`, `512 B`: at most three significant digits."""
    if size_bytes < 1024:
        return f"{size_bytes:.0f} B"
    exponent = 1
    while exponent < len(_UNITS) and size_bytes / 1024**exponent >= 1023.95:
        exponent += 1
    value = size_bytes / 1024**exponent
    digits = 0 if value >= 100 or value == int(value) else 1
    return f"{value:.{digits}f} {_UNITS[exponent - 1]}iB"
