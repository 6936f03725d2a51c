"""The codecs by name, from the entry points of the group `gmux.codecs`: gmux's own and those of other packages."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import cast

from gmux.codecs.base import Codec

GROUP = "gmux.codecs"


@cache
def _points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def names() -> list[str]:
    """The names of all codecs, sorted."""
    return sorted(_points())


def load(name: str) -> type[Codec]:
    """The class of the codec `name`. Raises KeyError when there is none."""
    return cast("type[Codec]", _points()[name].load())
