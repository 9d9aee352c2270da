"""Lengths of time as people write and read them: 10m, 1 h 30 min."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_PATTERN = re.compile(r"(\d+(?:\.\d+)?)\s*([smhd]?)", re.IGNORECASE)


def parse_duration(text: str) -> float:
    """Give seconds for `90`, `90s`, `10m`, `1.5h`, `2d`.

    Raises:
        ValueError: no length of time; the text is for people.
    """
    match = _PATTERN.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is no length of time: write it like 30s, 10m, 2h or 1d")
    return float(match[1]) * _UNITS[match[2].lower() or "s"]


def format_duration(seconds: float) -> str:
    """Give `45 s`, `10 min`, `1 h 30 min`, `2 d 3 h`: two units at most."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        minutes, rest = divmod(whole, 60)
        return f"{minutes} min" + (f" {rest} s" if rest and minutes < 10 else "")
    if whole < 86400:
        hours, rest = divmod(whole, 3600)
        return f"{hours} h" + (f" {rest // 60} min" if rest >= 60 else "")
    days, rest = divmod(whole, 86400)
    return f"{days} d" + (f" {rest // 3600} h" if rest >= 3600 else "")
