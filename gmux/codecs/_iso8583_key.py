"""What an ISO 8583 answer has in common with its request: the kind of message, and the key fields.

The third digit of a message type is the function: an answer's is one more than its request's (0200 and 0210, 0420 and
0430, 0800 and 0810). The digits before it must be the same; the last one, which says who sent and how often, may
differ. A reversal repeats the number of its purchase, so the kind is a part of the key.

A message is read only up to its last key field. Where the fields lie depends on the bitmap alone, and a route sees few
different ones, so the steps from field to field are kept by bitmap.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
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

#: The second digit of such a message type.
NETWORK_MANAGEMENT = "8"


class Key(NamedTuple):
    """Equal for a request and its answer. `kind` is the message type without what may differ."""

    kind: str
    values: tuple[bytes, ...]


class _Kind(NamedTuple):
    """`name` is the same for request and answer; `fields` are the key fields that were asked for, None: the default."""

    name: str
    is_answer: bool
    fields: tuple[int, ...] | None


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
        self._read_kind = lru_cache(maxsize=MAX_PLANS)(self._kind)
        self._plan = lru_cache(maxsize=MAX_PLANS)(self._make_plan)

    def read(self, message: bytes, at: int) -> tuple[Key, bool]:
        """The key of the message that begins `at`, and whether it is an answer. Raises FramingError."""
        at, _ = _walk(message, at, self._header)
        end = at + self._mti.size
        kind = self._read_kind(message[at:end])
        at, end = end, end + self._bitmap.size
        bitmap = message[at:end]
        at = end
        if self._has_high_fields:
            # The fields above 64 are told by the second bitmap, which is the first field.
            bitmap += message[at : at + self._bitmap.size]
        values = []
        for step in self._plan(kind.fields, bitmap):
            if step.header:
                at, value = _walk(message, at, step)
                if step.is_key:
                    values.append(value)
            else:
                end = at + step.size
                if step.is_key:
                    values.append(message[at:end])
                at = end
        if at > len(message):
            raise FramingError("a message ends before its key fields")
        return Key(kind.name, tuple(values)), kind.is_answer

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

    def _make_plan(self, wanted: tuple[int, ...] | None, bitmap: bytes) -> tuple[_Step, ...]:
        """The steps to the last key field of a message with this bitmap; fixed ones that are passed over are joined.

        Key fields that a message does not have take part in the key by their absence: a step of no bytes.
        """
        size = self._bitmap.size
        present = _numbers(bitmap[:size], 0, self._bitmap.encoding)
        if self._has_high_fields and 1 in present:
            present |= _numbers(bitmap[size:], 64, self._bitmap.encoding)
        fields = wanted or (DEFAULT_FIELDS if TERMINAL in present else WITHOUT_TERMINAL)
        steps: list[_Step] = []
        for number in sorted(present | set(fields)):
            if number > max(fields):
                break
            is_key = number in fields
            step = _step(self._spec, str(number), is_key) if number in present else _NOTHING
            if steps and not (is_key or steps[-1].is_key or step.header or steps[-1].header):
                steps[-1] = steps[-1]._replace(size=steps[-1].size + step.size)
            else:
                steps.append(step)
        return tuple(steps)


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
    try:
        bits = int.from_bytes(raw, "big") if encoding == "b" else int(_text(raw, encoding) or "-", 16)
    except ValueError:
        raise FramingError("a bitmap is not hexadecimal") from None
    return {offset + number for number in range(1, 65) if bits >> (64 - number) & 1}


def _walk(message: bytes, at: int, step: _Step) -> tuple[int, bytes]:
    """Where the next field begins, and the value of this one."""
    size = step.size
    if step.header:
        raw = message[at : at + step.header]
        at += step.header
        try:
            if step.encoding == "b":
                size = int.from_bytes(raw, "big")
            else:
                size = int(raw.hex() if step.encoding == "bcd" else _text(raw, step.encoding))
        except ValueError:
            raise FramingError("the length of a field is not a number") from None
        if not 0 <= size <= step.limit:
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
