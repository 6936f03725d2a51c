"""Figures and their columns, for both measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Columns of words; the others are numbers, which stand to the right.
WORDS = ("variant", "proxy", "note")


def quantile(values: Sequence[float], share: float) -> float | None:
    """The smallest of the values that no less than `share` of them keep to; None when there is none."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else None


def columns(table: Sequence[Sequence[str]]) -> str:
    """The table as text; its first row names the columns."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = (zip(table[0], row, widths, strict=True) for row in table)
    return "\n".join(
        "  ".join(cell.ljust(width) if name in WORDS else cell.rjust(width) for name, cell, width in line).rstrip()
        for line in lines
    )
