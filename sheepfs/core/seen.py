"""How far somebody has come in the numbers that etcd gives out."""

from __future__ import annotations

from typing import NamedTuple


class Seen(NamedTuple):
    """The highest number of each kind that somebody knows of; 0: none."""

    epoch: int = 0
    """Of a cluster map."""
    token: int = 0
    """That fences older holders of a VDI."""
    layer: int = 0
    """Serial of a layer."""

    @classmethod
    def parse(cls, content: object) -> Seen:
        """Parse the JSON of one (ValueError)."""
        match content:
            case [int(), int(), int()]:
                return cls(*content)
            case _:
                raise ValueError(f"{content!r} is not [epoch, token, layer]")
