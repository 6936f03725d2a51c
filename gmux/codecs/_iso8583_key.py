"""What an ISO 8583 answer has in common with its request: the kind of message, and the key fields.

The third digit of a message type is the function: an answer's is one more than its request's (0200 and 0210, 0420 and
0430, 0800 and 0810). The digits before it must be the same; the last one, which says who sent and how often, may
differ. A reversal repeats the number of its purchase, so the kind is a part of the key.

A message is read only up to its last key field. Where the fields lie depends on the bitmaps alone, and a route sees few
different ones, so the way from field to field is kept by bitmaps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

from gmux.codecs._card_data import SECRET_FIELDS
from gmux.codecs._iso8583_identity import is_answer, kind_of
from gmux.codecs._iso8583_spec import SECOND_BITMAP, THIRD_BITMAP, Spec, Step, read_layout
from gmux.errors import FramingError

#: Number and terminal; without a terminal, as in most network messages, the time.
DEFAULT_FIELDS = (11, 41)
WITHOUT_TERMINAL = (7, 11)
TERMINAL = 41

#: Bitmaps whose plans are kept.
MAX_PLANS = 256

#: The second digit of such a message type.
NETWORK_MANAGEMENT = "8"

#: What a description shows: this many key fields, and this many characters of each.
MAX_SHOWN_FIELDS = 7
MAX_SHOWN = 16

#: As many digits in a row may be a card number, which a spec that does not fit takes for another field.
_LIKE_A_CARD_NUMBER = re.compile("[0-9]{13,}")


#: The kind of message with the numbers of the key fields that it has (`020 11 41`), and then the values of these.
Key = tuple[str | bytes, ...]


class _Kind(NamedTuple):
    """`name` is the same for request and answer; `fields` are the key fields that were asked for, None: the default."""

    type: str
    name: str
    is_answer: bool
    fields: tuple[int, ...] | None


class _Plan(NamedTuple):
    """The way to the key fields of messages that begin alike.

    `places` are those of key fields that lie before the first field of variable length, which begins at `size`; all are
    counted from the message type. When `more` is not 0, this many bytes say what the plan is.
    """

    more: int
    name: str
    is_answer: bool
    places: tuple[tuple[int, int], ...]
    size: int
    legs: tuple[_Leg, ...]


class _Leg(NamedTuple):
    """A field of variable length, which may be a key field, and `size` bytes of fixed length behind it, with the places
    of key fields in them."""

    step: Step
    is_key: bool
    places: tuple[tuple[int, int], ...]
    size: int


class KeyReader:
    """Reads keys by `spec`. `fields` maps a message type, or "" for all others, to the key fields that it has.

    Raises ConfigError for a spec by which the fields of a message could lie elsewhere than pyiso8583 finds them.
    """

    def __init__(self, spec: Spec, fields: Mapping[str, tuple[int, ...]]) -> None:
        self._fields = {kind_of(mti) if mti else "": numbers for mti, numbers in fields.items()}
        self._layout = read_layout(spec, {*DEFAULT_FIELDS, *WITHOUT_TERMINAL}.union(*fields.values()))
        self._header = self._layout.header
        self._type_size = self._layout.type.size
        self._lead = self._type_size + self._layout.primary.size
        self._read_kind = lru_cache(maxsize=MAX_PLANS)(self._kind)
        self._plan = lru_cache(maxsize=MAX_PLANS)(self._make_plan)

    def read(self, message: bytes, at: int) -> tuple[Key, bool]:
        """The key of the message that begins `at`, and whether it is an answer. Raises FramingError.

        The key is that of the fields which pyiso8583 finds, for each message that pyiso8583 accepts and gmux does.
        """
        if self._header is not None:
            at, _ = self._header.walk(message, at)
        plan = self._plan(message[at : at + self._lead])
        if plan.more:
            if len(message) < at + plan.more:
                raise FramingError("a message ends before its fields")
            plan = self._plan(message[at : at + plan.more])
        values = [message[at + begin : at + end] for begin, end in plan.places]
        at += plan.size
        for step, is_key, places, size in plan.legs:
            at, value = step.walk(message, at)
            if is_key:
                values.append(value)
            for begin, end in places:
                values.append(message[at + begin : at + end])
            at += size
        if at > len(message):
            raise FramingError("a message ends before its key fields")
        return (plan.name, *values), plan.is_answer

    def kind(self, message: bytes, at: int) -> tuple[str, bool]:
        """The kind of the message that begins `at`, and whether it is an answer. Raises FramingError.

        The kind is the same for a request and its answer: the version and class of the message type, and the function
        of the request (020 for 0200 and 0210). Nothing behind the message type is read.
        """
        kind = self._kind_at(message, at)
        return kind.name, kind.is_answer

    def is_network_request(self, message: bytes, at: int) -> bool:
        """Whether the message is one of network management that asks for an answer. Raises FramingError."""
        kind = self._kind_at(message, at)
        return kind.name[1] == NETWORK_MANAGEMENT and not kind.is_answer

    def describe(self, message: bytes, at: int) -> str:
        """What a log line may say of the message that begins `at`: `0800, 11=000123, 41=TERM0001`. Never raises.

        Its message type and its key fields, without those of card data, as far as they can be read; printable ASCII of
        at most 200 characters. A value that is not printable is in hexadecimal.
        """
        try:
            words = [self._kind_at(message, at).type]
        except FramingError:
            return f"{max(len(message) - at, 0)} bytes, whose type cannot be read"
        with suppress(FramingError):
            (name, *values), _ = self.read(message, at)
            shown = zip(str(name).split()[1:], values, strict=True)
            words += [f"{n}={self._show(int(n), v)}" for n, v in shown if n not in SECRET_FIELDS][:MAX_SHOWN_FIELDS]
        return ", ".join(words)

    def _show(self, number: int, value: str | bytes) -> str:
        assert isinstance(value, bytes)
        table = self._layout.text[number]
        text = "\0" if table is None else value.translate(table).decode("ascii")
        shown = value.hex() if "\0" in text else text
        shown = _LIKE_A_CARD_NUMBER.sub(lambda digits: "*" * len(digits[0]), shown)
        return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."

    def _kind_at(self, message: bytes, at: int) -> _Kind:
        if self._header is not None:
            at, _ = self._header.walk(message, at)
        return self._read_kind(message[at : at + self._type_size])

    def _kind(self, raw: bytes) -> _Kind:
        mti = self._layout.type.read(raw)
        if not mti.isdigit():
            raise FramingError("a message does not begin with a message type of 4 digits")
        name = kind_of(mti)
        return _Kind(mti, name, is_answer(mti), self._fields.get(name, self._fields.get("")))

    def _make_plan(self, lead: bytes) -> _Plan:
        """The way to the last key field of a message that begins with `lead`: its type and its first bitmap, and the
        second one too where the plan without it says so. Raises FramingError."""
        layout = self._layout
        kind = self._read_kind(lead[: self._type_size])
        at = self._lead
        present = layout.primary.read_bitmap(lead[self._type_size : at], 0)
        if SECOND_BITMAP in present:
            if layout.secondary is None:
                raise FramingError("a message has a second bitmap, which --spec does not have")
            begin, at = at, at + layout.secondary.size
            if len(lead) == begin:
                return _Plan(at, "", False, (), 0, ())
            present |= layout.secondary.read_bitmap(lead[begin:at], 64)
            if THIRD_BITMAP in present:
                # Its fields lie behind all key fields, so it is not read.
                at += layout.secondary.size
        present -= {SECOND_BITMAP, THIRD_BITMAP}
        wanted = kind.fields or (DEFAULT_FIELDS if TERMINAL in present else WITHOUT_TERMINAL)
        keys = sorted(present.intersection(wanted))
        on_the_way = sorted(number for number in present if keys and number <= keys[-1])
        if not layout.fields.keys() >= set(on_the_way):
            raise FramingError("a message has a field that --spec does not have")
        runs: list[list[int]] = [[]]
        for number in on_the_way:
            if layout.fields[number].header:
                runs.append([])
            runs[-1].append(number)
        places, size = self._places(runs[0], keys, at)
        legs = [_Leg(layout.fields[run[0]], run[0] in keys, *self._places(run[1:], keys, 0)) for run in runs[1:]]
        return _Plan(0, " ".join((kind.name, *map(str, keys))), kind.is_answer, places, size, tuple(legs))

    def _places(self, run: list[int], keys: list[int], at: int) -> tuple[tuple[tuple[int, int], ...], int]:
        """Where the key fields of a run of fixed fields that begins `at` lie, and where it ends."""
        places = []
        for number in run:
            begin, at = at, at + self._layout.fields[number].size
            if number in keys:
                places.append((begin, at))
        return tuple(places), at
