"""Feeders: the same bytes cut in different ways must give the same messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

from hypothesis import strategies as st


def in_one(data: bytes) -> Iterator[list[bytes]]:
    yield [data]


def by_byte(data: bytes) -> Iterator[list[bytes]]:
    yield [data[at : at + 1] for at in range(len(data))]


def in_two(data: bytes) -> Iterator[list[bytes]]:
    """Every split in two pieces."""
    for at in range(1, len(data)):
        yield [data[:at], data[at:]]


FEEDERS: list[Callable[[bytes], Iterator[list[bytes]]]] = [in_one, by_byte, in_two]


@st.composite
def cuts(draw: st.DrawFn, data: bytes) -> list[bytes]:
    """`data` in random pieces, none of them empty."""
    marks = [0, *sorted(draw(st.lists(st.integers(0, len(data)), max_size=12))), len(data)]
    return [data[start:end] for start, end in pairwise(marks) if start < end]


def frames(decoder, pieces: list[bytes]) -> list[bytes]:
    """What `decoder` makes of `pieces`; asks for events after each piece, as gmux does after each read."""
    found = []
    for piece in pieces:
        decoder.receive_data(piece)
        while (event := decoder.next_event()) is not None:
            found.append(event.data)
    return found
