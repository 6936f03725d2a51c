"""Where the fields of an ISO 8583 message lie, by a spec in the form of pyiso8583.

gmux finds each field where pyiso8583's decoder finds it (decoder.py of pyiso8583 4), or refuses: a key that is read in
the wrong place may be the key of another client's request. A spec that leaves a place open is refused at start.
A message is refused where pyiso8583 reads more than its encoder writes: a length of `+6`, a bitmap with blanks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any, NamedTuple

from iso8583.specs import default, default_ascii

from gmux.errors import ConfigError, FramingError

Spec = Mapping[str, Mapping[str, Any]]

#: The specs that have a name: digits and bitmaps in ASCII, or bitmaps and a few fields in binary.
SPECS: dict[str, Spec] = {"ascii": default_ascii, "binary": default}

#: Bits that announce a further bitmap; as in pyiso8583, they are no fields, whatever the spec has under their number.
SECOND_BITMAP, THIRD_BITMAP = 1, 65
LAST_FIELD = 192

#: Bytes of a length header. More would count messages that cannot be.
MAX_LENGTH_HEADER = 16

DIGITS = "0123456789"
HEX_DIGITS = "0123456789ABCDEFabcdef"
_PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))


class Digits(NamedTuple):
    """Digits in `size` bytes: two a byte where `table` is None, else one a byte, made ASCII by `table`."""

    size: int
    table: bytes | None

    def read(self, raw: bytes) -> str:
        """The digits, in ASCII; a NUL stands for each byte that is none. Raises FramingError when some are missing."""
        if len(raw) != self.size:
            raise FramingError("a message ends before its fields")
        return raw.hex() if self.table is None else raw.translate(self.table).decode("ascii")

    def read_bitmap(self, raw: bytes, offset: int) -> set[int]:
        """The fields that the bitmap `raw` announces; `offset` is 64 for the second one. Raises FramingError."""
        text = self.read(raw)
        if "\0" in text:
            raise FramingError("a bitmap is not hexadecimal")
        bits = int(text, 16)
        return {offset + number for number in range(1, 65) if bits >> (64 - number) & 1}


class Step(NamedTuple):
    """The way over one field: `size` bytes when `header` is 0, else as many as `length` reads from a header of `header`
    bytes, in nibbles or in bytes, at most `limit`."""

    size: int
    header: int
    length: Callable[[bytes], int]
    limit: int
    in_nibbles: bool

    def walk(self, message: bytes, at: int) -> tuple[int, bytes]:
        """Where the next field begins, and the value of the one that begins `at`.

        The next field of a message that ends too early begins behind its end. Raises FramingError.
        """
        begin = at + self.header
        size = self.size
        if self.header:
            size = self.length(message[at:begin])
            if size > self.limit:
                raise FramingError("a field is longer than its spec allows")
            if self.in_nibbles:
                size = (size + 1) // 2
        end = begin + size
        return end, message[begin:end]


class Layout(NamedTuple):
    """A spec, checked. `header` is what stands before the message type; `text` makes values of a field readable."""

    header: Step | None
    type: Digits
    primary: Digits
    secondary: Digits | None
    fields: dict[int, Step]
    text: dict[int, bytes | None]


def read_layout(spec: Spec, needed: Iterable[int]) -> Layout:
    """The layout of messages by `spec`, which must have the fields `needed`. Raises ConfigError with the field."""
    for name in ("h", "t", "p"):
        if name not in spec:
            raise _wrong(name, "it is missing, but each message has it")
    numbers = [number for number in range(2, LAST_FIELD + 1) if number != THIRD_BITMAP and str(number) in spec]
    for number in sorted(needed):
        if number == THIRD_BITMAP:
            raise ConfigError(f"--key-fields: {number} announces a third bitmap, so it has no value; use other fields")
        if number not in numbers:
            raise _wrong(str(number), "it is missing, but it is a key field: add it, or set --key-fields")
        if number > 64 and "1" not in spec:
            raise _wrong("1", f"it is missing, but it is the bitmap that announces the key field {number}")
    # pyiso8583 reads neither a length nor a limit for these three, and nothing at all for a header of no bytes.
    return Layout(
        _step(spec, "h") if _number(spec, "h", "max_len", -1) > 0 else None,
        _digits(spec, "t", DIGITS, 4),
        _digits(spec, "p", HEX_DIGITS, 16),
        _digits(spec, "1", HEX_DIGITS, 16) if "1" in spec else None,
        {number: _step(spec, str(number)) for number in numbers},
        {number: _text_table(spec, str(number)) for number in numbers},
    )


def _wrong(name: str, problem: str) -> ConfigError:
    return ConfigError(f"--spec: field {name}: {problem}")


def _property(spec: Spec, name: str, what: str) -> Any:
    field = spec[name]
    if not isinstance(field, Mapping):
        raise _wrong(name, "expected an object with data_enc, len_enc, len_type and max_len, as in pyiso8583")
    if what not in field:
        raise _wrong(name, f"{what} is missing")
    return field[what]


def _number(spec: Spec, name: str, what: str, least: int = 0) -> int:
    value = _property(spec, name, what)
    if type(value) is not int or value < least:
        raise _wrong(name, f"{what} is {_shown(value)}: expected a number of 0 or more, such as 6")
    return value


def _step(spec: Spec, name: str) -> Step:
    field = spec[name]
    header, limit = _number(spec, name, "len_type"), _number(spec, name, "max_len")
    if header > MAX_LENGTH_HEADER:
        raise _wrong(name, f"len_type is {header}: expected a length of at most {MAX_LENGTH_HEADER} bytes")
    count = field.get("len_count", "bytes")
    if count not in ("bytes", "nibbles"):
        # pyiso8583 takes any other word for bytes, so a misspelt one would double the field.
        raise _wrong(name, f"len_count is {_shown(count)}: expected bytes or nibbles")
    for pad in ("left_pad", "right_pad"):
        if not isinstance(field.get(pad, ""), str):
            raise _wrong(name, f'{pad} is {_shown(field[pad])}: expected a digit in quotes, such as "0"')
    encoding = _property(spec, name, "data_enc")
    if encoding != "b":
        _encode(name, "data_enc", encoding, DIGITS)
    in_nibbles = count == "nibbles"
    if header:
        return Step(0, header, _length_reader(spec, name), limit, in_nibbles)
    return Step((limit + 1) // 2 if in_nibbles else limit, 0, _decimal, limit, False)


def _length_reader(spec: Spec, name: str) -> Callable[[bytes], int]:
    encoding = _property(spec, name, "len_enc")
    if encoding == "b":
        return _binary
    if encoding == "bcd":
        return _packed
    table = _digit_table(name, "len_enc", encoding, DIGITS)
    is_ascii = DIGITS.encode(encoding) == DIGITS.encode()
    return _decimal if is_ascii else partial(_translated, table)


def _binary(raw: bytes) -> int:
    return int.from_bytes(raw, "big")


def _packed(raw: bytes) -> int:
    return _decimal(raw.hex())


def _translated(table: bytes, raw: bytes) -> int:
    return _decimal(raw.translate(table))


def _decimal(text: bytes | str) -> int:
    # int() would also take signs, blanks and underscores.
    if not text.isdigit():
        raise FramingError("the length of a field is not a number")
    return int(text)


def _digits(spec: Spec, name: str, alphabet: str, number: int) -> Digits:
    encoding = _property(spec, name, "data_enc")
    if encoding == "b":
        return Digits(number // 2, None)
    return Digits(number, _digit_table(name, "data_enc", encoding, alphabet))


def _digit_table(name: str, what: str, encoding: Any, alphabet: str) -> bytes:
    """What makes digits in this encoding those of ASCII, byte by byte, and other bytes NUL."""
    coded = _encode(name, what, encoding, alphabet)
    table = _table(encoding, alphabet)
    if coded.translate(table) != alphabet.encode() or coded.decode(encoding) != alphabet:
        raise _wrong(name, f"{what} is {_shown(encoding)}: expected one byte for each digit, as ascii and cp500 have")
    return table


def _text_table(spec: Spec, name: str) -> bytes | None:
    encoding = spec[name]["data_enc"]
    return None if encoding == "b" else _table(encoding, _PRINTABLE)


@lru_cache(maxsize=32)
def _table(encoding: str, alphabet: str) -> bytes:
    table = bytearray(256)
    for char in alphabet:
        with suppress(UnicodeError):
            coded = char.encode(encoding)
            if len(coded) == 1:
                table[coded[0]] = ord(char)
    return bytes(table)


def _encode(name: str, what: str, encoding: Any, text: str) -> bytes:
    try:
        return text.encode(encoding)
    except (LookupError, TypeError, ValueError):
        hint = "b, which is how pyiso8583 calls packed digits" if encoding == "bcd" else "b, ascii, cp500 or alike"
        raise _wrong(name, f"{what} is {_shown(encoding)}: expected {hint}") from None


def _shown(value: object) -> str:
    return repr(value)[:40]
