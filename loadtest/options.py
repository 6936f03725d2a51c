"""Values of the command line that the commands here share; a wrong one ends its command with 2 and one line."""

from __future__ import annotations

import re
from collections.abc import Callable

import docopt

from gmux.kinds import parse_seconds
from gmux.samples.command import value
from loadtest.protocols import PROTOCOLS, Protocol

MAX_DELAY = 10.0


def protocol(words: docopt.ParsedOptions) -> Protocol:
    return value(words, "--proto", PROTOCOLS.__getitem__, "one of " + ", ".join(PROTOCOLS))


def whole(words: docopt.ParsedOptions, name: str, least: int, most: int) -> int:
    return value(words, name, _whole(least, most), f"a number from {least} to {most}")


def steps(words: docopt.ParsedOptions, name: str, most: int) -> list[int]:
    """Numbers that go up, as in 1,10,50."""

    def read(text: str) -> list[int]:
        numbers = [_whole(1, most)(word) for word in text.split(",")]
        if numbers != sorted(set(numbers)):
            raise ValueError
        return numbers

    return value(words, name, read, f"numbers from 1 to {most} that go up, such as 1,10,50")


def delay(words: docopt.ParsedOptions, name: str) -> float:
    def read(text: str) -> float:
        seconds = parse_seconds(text)
        if seconds > MAX_DELAY:
            raise ValueError
        return seconds

    return value(words, name, read, f"a time such as 2ms or 0.5s, at most {MAX_DELAY:g}s")


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return read
