"""What an ISO 8583 answer has in common with its request: the kind of message, and the key fields.

The third digit of a message type is the function: an answer's is one more than its request's (0200 and 0210, 0420 and
0430, 0800 and 0810). The digits before it must be the same; the last one, which says who sent and how often, may
differ. A reversal repeats the number of its purchase, so the kind is a part of the key.

A message is read only up to its last key field. Where the fields lie depends on the bitmap alone, and a route sees few
different ones, so the steps from field to field are kept by bitmap.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

from iso8583.specs import default, default_ascii

from gmux.errors import ConfigError, FramingError

Spec = Mapping[str, Mapping[str, Any]]

#: The specs that have a name: digits and bitmaps in ASCII, or bitmaps and a few fields in binary.
SPECS: dict[str, Spec] = {"ascii": default_ascii, "binary": default}

#: Number and terminal; without a terminal, as in most network messages, the time.
DEFAULT_FIELDS = (11, 41)
WITHOUT_TERMINAL = (7, 11)
TERMINAL = 41

#: Bitmaps whose steps are kept.
MAX_PLANS = 256

DIGITS = "0123456789"
_HEX = re.compile(r"[0-9A-Fa-f]{16}", re.ASCII)

#: The second digit of such a message type.
NETWORK_MANAGEMENT = "8"


#: The kind of message, which is the message type without what may differ, and the values of the key fields.
Key = tuple[str | bytes, ...]


class _Kind(NamedTuple):
    """`name` is the same for request and answer; `fields` are the key fields that were asked for, None: the default."""

    name: str
    is_answer: bool
    fields: tuple[int, ...] | None


class _Plan(NamedTuple):
    """`places` are those of the key fields behind the bitmap, and `end` that of the last; 0: they are not fixed."""

    kind: _Kind
    steps: tuple[_Step, ...]
    places: tuple[tuple[int, int], ...]
    end: int


class _Step(NamedTuple):
    """One field on the way. `size` is its length when it is fixed; else `length` reads it from a header of `header`
    bytes. `is_key`: its value belongs to the key."""

    size: int
    header: int
    encoding: str
    limit: int
    in_nibbles: bool
    is_key: bool


class KeyReader:
    """Reads keys by `spec`. `fields` maps a message type, or "" for all others, to the key fields that it has."""

    def __init__(self, spec: Spec, fields: Mapping[str, tuple[int, ...]]) -> None:
        self._spec = spec
        self._fields = {_kind_name(mti) if mti else "": numbers for mti, numbers in fields.items()}
        self._header = _step(spec, "h", False)
        self._mti = _step(spec, "t", False)
        self._bitmap = _step(spec, "p", False)
        for numbers in (*fields.values(), DEFAULT_FIELDS, WITHOUT_TERMINAL):
            for number in numbers:
                _step(spec, str(number), True)
        self._has_high_fields = any(number > 64 for numbers in fields.values() for number in numbers)
        # Message type and bitmap say where the fields are; where fields above 64 are asked for, the second bitmap too,
        # which is the first field.
        self._lead = self._mti.size + self._bitmap.size
        self._has_second_bitmap = lru_cache(maxsize=MAX_PLANS)(self._announces_second)
        self._read_kind = lru_cache(maxsize=MAX_PLANS)(self._kind)
        self._plan = lru_cache(maxsize=MAX_PLANS)(self._make_plan)

    def read(self, message: bytes, at: int) -> tuple[Key, bool]:
        """The key of the message that begins `at`, and whether it is an answer. Raises FramingError."""
        if self._header.header or self._header.size:
            at, _ = _walk(message, at, self._header)
        lead = message[at : at + self._lead]
        if self._has_high_fields and self._has_second_bitmap(lead):
            lead = message[at : at + self._lead + self._bitmap.size]
        plan = self._plan(lead)
        at += self._lead
        if plan.end and len(message) >= at + plan.end:
            # All fields on the way are of fixed length: their places are known.
            return (
                plan.kind.name,
                *[message[at + begin : at + end] for begin, end in plan.places],
            ), plan.kind.is_answer
        values: list[bytes] = []
        for step in plan.steps:
            at, value = _walk(message, at, step)
            if step.is_key:
                values.append(value)
        if at > len(message):
            raise FramingError("a message ends before its key fields")
        return (plan.kind.name, *values), plan.kind.is_answer

    def kind(self, message: bytes, at: int) -> tuple[str, bool]:
        """The name of the kind of the message that begins `at`, and whether it is an answer. Raises FramingError."""
        at, _ = _walk(message, at, self._header)
        kind = self._read_kind(message[at : at + self._mti.size])
        return kind.name, kind.is_answer

    def describe(self, message: bytes, at: int) -> str:
        return f"{len(message) - at} bytes"

    def is_network_request(self, message: bytes, at: int) -> bool:
        """Whether the message is one of network management that asks for an answer. Raises FramingError."""
        at, _ = _walk(message, at, self._header)
        kind = self._read_kind(message[at : at + self._mti.size])
        return kind.name[1] == NETWORK_MANAGEMENT and not kind.is_answer

    def _kind(self, raw: bytes) -> _Kind:
        mti = raw.hex() if self._mti.encoding == "b" else _text(raw, self._mti.encoding)
        if len(mti) != 4 or any(digit not in DIGITS for digit in mti):
            raise FramingError("a message does not begin with a message type of 4 digits")
        name = _kind_name(mti)
        return _Kind(name, int(mti[2]) % 2 == 1, self._fields.get(name, self._fields.get("")))

    def _announces_second(self, lead: bytes) -> bool:
        return 1 in _numbers(lead[self._mti.size :], 0, self._bitmap.encoding)

    def _make_plan(self, lead: bytes) -> _Plan:
        """The way to the last key field of a message that begins so. Raises FramingError.

        Key fields that a message does not have take part in the key by their absence: a step of no bytes.
        """
        kind = self._read_kind(lead[: self._mti.size])
        size = self._bitmap.size
        bitmap = lead[self._mti.size :]
        present = _numbers(bitmap[:size], 0, self._bitmap.encoding)
        if self._has_high_fields and 1 in present:
            present |= _numbers(bitmap[size:], 64, self._bitmap.encoding)
        wanted = kind.fields or (DEFAULT_FIELDS if TERMINAL in present else WITHOUT_TERMINAL)
        try:
            steps = [
                _step(self._spec, str(number), number in wanted) if number in present else _NOTHING
                for number in sorted(present | set(wanted))
                if number <= max(wanted)
            ]
        except ConfigError:
            raise FramingError("a message has a field that --spec does not have") from None
        ends = list(accumulate(step.size for step in steps))
        places = [(end - step.size, end) for step, end in zip(steps, ends, strict=True) if step.is_key]
        is_fixed = not any(step.header for step in steps)
        return _Plan(kind, tuple(steps), tuple(places), ends[-1] if is_fixed else 0)


_NOTHING = _Step(0, 0, "", 0, False, True)


def _kind_name(mti: str) -> str:
    return f"{mti[:2]}{int(mti[2]) // 2 * 2}"


def _text(raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError:
        raise FramingError("a message has characters that its encoding does not have") from None


def _numbers(raw: bytes, offset: int, encoding: str) -> set[int]:
    """The fields that a bitmap announces."""
    if encoding == "b":
        bits = int.from_bytes(raw, "big")
    else:
        text = _text(raw, encoding)
        if _HEX.fullmatch(text) is None:
            # int() would also take signs, blanks and underscores, and another reader other fields.
            raise FramingError("a bitmap is not hexadecimal")
        bits = int(text, 16)
    return {offset + number for number in range(1, 65) if bits >> (64 - number) & 1}


def _walk(message: bytes, at: int, step: _Step) -> tuple[int, bytes]:
    """Where the next field begins, and the value of this one."""
    size = step.size
    if step.header:
        raw = message[at : at + step.header]
        at += step.header
        if step.encoding == "b":
            size = int.from_bytes(raw, "big")
        else:
            text = raw.hex() if step.encoding == "bcd" else _text(raw, step.encoding)
            if not (text.isascii() and text.isdigit()):
                raise FramingError("the length of a field is not a number")
            size = int(text)
        if size > step.limit:
            raise FramingError("a field is longer than its spec allows")
    if step.in_nibbles:
        size = (size + 1) // 2
    return at + size, message[at : at + size]


def _step(spec: Spec, name: str, is_key: bool) -> _Step:
    """Raises ConfigError for a spec that cannot be used."""
    try:
        field = spec[name]
        header, limit = field["len_type"], field["max_len"]
        in_nibbles = field.get("len_count", "bytes") == "nibbles"
        encoding = field["len_enc"] if header else field["data_enc"]
        if type(header) is not int or type(limit) is not int or min(header, limit) < 0:
            raise TypeError
        if encoding not in ("b", "bcd"):
            "0".encode(encoding)
    except (KeyError, TypeError, LookupError, AttributeError):
        raise ConfigError(f"--spec: field {name} is missing or not in the form of pyiso8583") from None
    size = 0 if header else limit
    if in_nibbles and not header:
        size = (size + 1) // 2
    return _Step(size, header, encoding, limit, in_nibbles and header > 0, is_key)
