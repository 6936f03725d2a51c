"""What an ISO 8583 message is, read without a spec: its type and its number (field 11), as far as they can be read.

The type stands first, behind a TPDU or the header of BASE24 where there is one. Its four digits are in ASCII, EBCDIC or
BCD, and the digits of the fields are taken to be so, too. In the versions of 1987 and 1993 the fields up to 11 have
fixed lengths, except field 2. Two bytes of BCD may be there by chance, as a part of some other header: such a type is
believed only where field 11 is there and all between the bitmap and its end are digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

#: A TPDU has five bytes and begins with one of these.
TPDU_IDS = b"\x60\x68"
TPDU_SIZE = 5

#: The header of BASE24: these letters and nine digits.
BASE24 = b"ISO"
BASE24_SIZE = 12

#: Version (1987, 1993, 2003, national, private), class, function and origin: those digits that have a meaning.
_TYPE = re.compile(r"[01289][1-8][0-7][0-5]", re.ASCII)

#: A bitmap in hexadecimal digits.
_HEX_BITMAP = re.compile("[0-9A-Fa-f]{16}")

#: The digits of the fields from 3 to 11, in these versions.
DIGITS = {3: 6, 4: 12, 5: 12, 6: 12, 7: 10, 8: 8, 9: 8, 10: 8, 11: 6}
VERSIONS = "01"
ACCOUNT, NUMBER = 2, 11
MAX_ACCOUNT = 19

#: Plans that are kept.
MAX_PLANS = 512

#: The bytes of a type and a hexadecimal bitmap in ASCII.
LEAD = 20


class Identity(NamedTuple):
    """`kind` is the same for a request and its answer: 020 for 0200, 0201 and 0210. `key` has the fields that the two
    must have in common, mostly 11, by number and as the message has them; those that are there and could be read."""

    kind: str
    is_answer: bool
    key: Mapping[str, str | bytes]

    def fits(self, request: Identity | None) -> bool:
        """Whether this may be the answer to `request`; None: nothing is known of that."""
        if not self.is_answer or request is None:
            return self.is_answer
        if self.kind != request.kind:
            return False
        return all(self.key.get(number, value) == value for number, value in request.key.items())


def kind_of(mti: str) -> str:
    """The first two digits of a type and its function, which is odd in an answer, as that of the request."""
    return f"{mti[:2]}{int(mti[2]) // 2 * 2}"


def is_answer(mti: str) -> bool:
    return int(mti[2]) % 2 == 1


class _Coding(NamedTuple):
    """How digits are written. `pairs`: two in a byte, so `charset` is not used."""

    charset: str
    pairs: bool = False

    def text(self, raw: bytes) -> str:
        return raw.hex() if self.pairs else raw.decode(self.charset)

    def bytes_of(self, digits: int) -> int:
        return (digits + 1) // 2 if self.pairs else digits


_ASCII, _EBCDIC, _BCD = _Coding("latin-1"), _Coding("cp500"), _Coding("", pairs=True)

#: By the first byte of a type.
_CODINGS = (
    {ord(digit): _ASCII for digit in "01289"}
    | {0xF0 + int(digit): _EBCDIC for digit in "01289"}
    | {int(f"{version}{group}", 16): _BCD for version in "01289" for group in "12345678"}
)


class _Plan(NamedTuple):
    """What type and bitmap say. `first` is where the fields begin, counted from the type; `size` the bytes of those
    from 3 to 11, and `number_size` of 11 alone; 0: it cannot be read. `number_at` is where 11 begins; 0: that is not
    fixed."""

    mti: str
    kind: str
    is_answer: bool
    coding: _Coding
    first: int
    has_account: bool
    size: int
    number_size: int
    number_at: int


#: By the bytes of type and bitmap.
_plans: dict[bytes, _Plan] = {}


def is_plain_answer(answer: bytes, request: bytes, at: int) -> bool:
    """A quick yes to whether `answer` is that to `request`, both of which begin `at`; false says nothing.

    Quick where both are in ASCII, with a hexadecimal bitmap and without field 2, and were seen before.
    """
    mine = _plans.get(answer[at : at + LEAD])
    its = _plans.get(request[at : at + LEAD])
    if mine is None or its is None or not mine.is_answer or mine.kind != its.kind:
        return False
    begin, asked = at + mine.number_at, at + its.number_at
    return begin > at and asked > at and answer[begin : begin + 6] == request[asked : asked + 6]


def is_known_answer(message: bytes, at: int) -> bool:
    """Whether the type of the message says that it is an answer."""
    plan = _plans.get(message[at : at + LEAD])
    if plan is not None and not plan.coding.pairs:  # what looks like BCD is believed only with its number
        return plan.is_answer
    identity = identify(message, at)
    return identity is not None and identity.is_answer


def identify(message: bytes, at: int) -> Identity | None:
    """What the message that begins `at` is; None: not even its type can be read."""
    found = _read(message, at)
    if found is None:
        return None
    plan, number = found
    return Identity(plan.kind, plan.is_answer, {str(NUMBER): number} if number else {})


def describe(message: bytes, at: int) -> str:
    """Type and number for the log, and no other field."""
    found = _read(message, at)
    if found is None:
        return f"{len(message) - at} bytes, whose type cannot be read"
    plan, number = found
    return plan.mti + (f", 11={plan.coding.text(number)}" if number else "")


def _read(message: bytes, at: int) -> tuple[_Plan, bytes | None] | None:
    """The plan of a message, and its field 11 as `_number` has it; None: not even its type can be read."""
    found = _find(message, at)
    if found is None:
        return None
    plan, at = found
    number = _number(message, at, plan)
    return None if number is None and plan.coding.pairs else (plan, number)


def _find(message: bytes, at: int) -> tuple[_Plan, int] | None:
    """The plan of a message, and where its type begins; None: there is no type."""
    if message[at : at + 1] in (TPDU_IDS[:1], TPDU_IDS[1:]):
        at += TPDU_SIZE
    elif message[at : at + len(BASE24)] == BASE24:
        at += BASE24_SIZE
    coding = _CODINGS.get(message[at]) if at < len(message) else None
    if coding is None:
        return None
    mti_size = coding.bytes_of(4)
    mti = coding.text(message[at : at + mti_size])
    if _TYPE.fullmatch(mti) is None:
        return None
    bitmap_size = 8 if coding.pairs or _HEX_BITMAP.fullmatch(coding.text(message[at + 4 : at + 20])) is None else 16
    lead = message[at : at + mti_size + bitmap_size]
    plan = _plans.get(lead)
    if plan is None:
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        plan = _plans[lead] = _make_plan(mti, coding, lead[mti_size:], bitmap_size)
    return plan, at


def _make_plan(mti: str, coding: _Coding, bitmap: bytes, bitmap_size: int) -> _Plan:
    bits = int(coding.text(bitmap), 16) if bitmap_size == 16 else int.from_bytes(bitmap.ljust(8, b"\0"), "big")
    present = {number for number in range(1, 65) if bits >> (64 - number) & 1}
    # The second bitmap is the first field.
    first = coding.bytes_of(4) + bitmap_size * (2 if 1 in present else 1)
    size = number_size = number_at = 0
    if NUMBER in present and mti[0] in VERSIONS:
        size = sum(coding.bytes_of(digits) for field, digits in DIGITS.items() if field in present)
        number_size = coding.bytes_of(DIGITS[NUMBER])
        number_at = first + size - number_size if ACCOUNT not in present else 0
    return _Plan(mti, kind_of(mti), is_answer(mti), coding, first, ACCOUNT in present, size, number_size, number_at)


def _number(message: bytes, at: int, plan: _Plan) -> bytes | None:
    """Field 11 of the message whose type begins `at`. None: it is not there, or what stands there are no digits."""
    coding = plan.coding
    begin = at + plan.first
    if plan.has_account:
        header = coding.bytes_of(2)
        length = coding.text(message[begin : begin + header])
        if not (length.isascii() and length.isdigit() and int(length) <= MAX_ACCOUNT):
            return None
        begin += header + coding.bytes_of(int(length))
    digits = message[begin : begin + plan.size]
    text = coding.text(digits)
    if not plan.size or len(digits) < plan.size or not (text.isascii() and text.isdigit()):
        return None
    # In BCD the length of field 2 may be in binary, which leads to other digits.
    return b"" if plan.has_account and coding.pairs else digits[-plan.number_size :]
