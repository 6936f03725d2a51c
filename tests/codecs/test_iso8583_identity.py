"""What an ISO 8583 message is, read without a spec."""

from __future__ import annotations

import iso8583
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iso8583.specs import default, default_ascii

from gmux.codecs._iso8583_identity import DIGITS, describe, identify, is_known_answer


def respelt(base, **fields):
    """`base` with digits and lengths written as `data_enc` and `len_enc` say, up to field 11."""
    spec = {name: dict(field) for name, field in base.items()}
    for name in ("t", "2", *map(str, DIGITS)):
        spec[name] |= fields
    return spec


BCD = respelt(default, data_enc="b", len_enc="bcd", len_count="nibbles")
for name, digits in {"t": 4, **{str(number): digits for number, digits in DIGITS.items()}}.items():
    BCD[name]["max_len"] = digits
BCD["2"] |= {"len_type": 1, "right_pad": "F"}

SPECS = {
    "ascii": default_ascii,
    "ascii, binary bitmaps": default,
    "ebcdic": respelt(default_ascii, data_enc="cp500", len_enc="cp500")
    | {name: default_ascii[name] | {"data_enc": "cp500"} for name in ("p", "1")},
    "ebcdic, binary bitmaps": respelt(default, data_enc="cp500", len_enc="cp500"),
    "bcd": BCD,
}
HEADERS = {"none": b"", "TPDU": b"\x60\x00\x03\x80\x00", "BASE24": b"ISO025000077"}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
each_header = pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)


def encode(spec, mti: str, **fields: str) -> bytes:
    named = {name.removeprefix("f"): value for name, value in fields.items()}
    return bytes(iso8583.encode({"h": "", "t": mti} | named, spec)[0])


@each_spec
@each_header
@pytest.mark.parametrize(
    ("mti", "kind", "is_answer"),
    [
        ("0200", "020", False),
        ("0210", "020", True),
        ("0221", "022", False),
        ("0430", "042", True),
        ("0800", "080", False),
        ("1814", "180", True),
    ],
)
def test_type_and_number_are_read_in_each_writing(spec, header, mti, kind, is_answer):
    message = encode(spec, mti, f3="000000", f7="1122153000", f11="000123")
    identity = identify(b"??" + header + message, 2)
    assert identity is not None
    assert identity[:2] == (kind, is_answer)
    assert describe(header + message, 0) == f"{mti}, 11=000123"


@each_spec
def test_number_behind_an_account_and_a_second_bitmap(spec):
    messages = [
        encode(spec, mti, f2=account, f4="000000000100", f11=number, f70="301")
        for mti, account, number in [
            ("0200", "4111111111111111", "000007"),
            ("0210", "41111111111111111", "000007"),
            ("0210", "4111111111111111", "000008"),
        ]
    ]
    request, answer, other = (identify(message, 0) for message in messages)
    assert answer.fits(request)
    # In BCD the length of field 2 is in doubt, and with it the place of the number.
    assert other.fits(request) == (spec is BCD)


def test_number_that_one_of_both_does_not_have_is_not_compared():
    request = identify(encode(default_ascii, "0800", f7="1122153000"), 0)
    assert identify(encode(default_ascii, "0810", f11="000001"), 0).fits(request)


def test_digits_of_2003_have_other_lengths_so_the_type_alone_is_read():
    message = encode(default_ascii, "2200", f11="000001")
    assert identify(message, 0) == ("220", False, {})
    assert describe(message, 0) == "2200"


def test_kinds_must_be_the_same():
    request = identify(encode(default_ascii, "0200", f11="000001"), 0)
    for mti, fits in {"0210": True, "0212": True, "0230": False, "0410": False, "0200": False, "0800": False}.items():
        assert identify(encode(default_ascii, mti, f11="000001"), 0).fits(request) == fits, mti


OPAQUE = {
    "empty": b"",
    "text": b"hello",
    "digits that are no type": b"0000",
    "too short": b"020",
    # Its first two bytes are 1601 in BCD.
    "a header of Visa": bytes.fromhex("160102009c000000000000000000000000000000000002002020000000800000"),
    "a binary header": bytes.fromhex("0100000000000000") + encode(default_ascii, "0200", f11="000001"),
    "BCD without a number": bytes.fromhex("02002000000000000000000000"),
    "BCD of type and bitmap": bytes.fromhex("02102000000000000000"),
    "BCD cut off": bytes.fromhex("0200202000000080"),
    "TPDU alone": b"\x60\0\1\0\0",
}


@pytest.mark.parametrize("message", OPAQUE.values(), ids=OPAQUE)
def test_what_is_no_type_is_not_taken_for_one(message):
    assert identify(message, 0) is None
    assert describe(message, 0) == f"{len(message)} bytes, whose type cannot be read"
    assert not is_known_answer(message, 0)


@given(st.binary(max_size=80), st.sampled_from([b"", b"0200", b"0210", b"\2\0", b"\xf0\xf2\xf0\xf0", b"`....02"]))
def test_any_bytes_are_read_or_not(data, beginning):
    message = beginning + data
    identity = identify(message, 0)
    words = describe(message, 0)
    assert words.isprintable() and len(words) < 60
    assert identity is None or (len(identity.kind) == 3 and all(value in message for value in identity.key.values()))


@given(st.data())
def test_number_is_what_pyiso8583_reads(data):
    spec = data.draw(st.sampled_from(list(SPECS.values())))
    names = data.draw(st.sets(st.sampled_from(sorted(DIGITS)))) | {11}
    fields = {
        f"f{n}": data.draw(st.text("0123456789", min_size=d, max_size=d)) for n, d in DIGITS.items() if n in names
    }
    if data.draw(st.booleans()):
        fields["f2"] = data.draw(st.text("0123456789", min_size=1, max_size=19))
    if data.draw(st.booleans()):
        fields["f70"] = "301"
    message = encode(spec, data.draw(st.sampled_from(["0100", "0110", "1420", "1430"])), **fields)
    _, encoded = iso8583.decode(message, spec)
    number = identify(message, 0).key.get("11", b"")
    assert number in (encoded["11"]["data"], b"")
    assert number or (spec is BCD and "f2" in fields)
