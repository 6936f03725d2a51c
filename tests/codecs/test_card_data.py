"""Card data never reaches the log: what `mask` overwrites, and what it leaves."""

from __future__ import annotations

import iso8583
import pytest
from hypothesis import given
from hypothesis import strategies as st
from iso8583.specs import default, default_ascii

from gmux.codecs._card_data import mask
from gmux.codecs.base import Limits
from gmux.codecs.iso8583 import Iso8583Codec, MpuCodec

PAN = "4000001234567899"
TRACK_1 = f"B{PAN}^DOE/JANE^29122010000000000"
TRACK_2 = f"{PAN}=29122010000012345678"
TRACK_3 = f"01{PAN}=724724100000000000030300XXXX040400099010=0000"
PIN = "DEADBEEFCAFEF00D"
ICC = "9F2608C0FFEE00BADDCAFE5A08" + PAN

SECRET = {"2": PAN, "35": TRACK_2, "36": TRACK_3, "45": TRACK_1, "52": PIN, "55": ICC}
HARMLESS = {
    "3": "000000",
    "4": "000000012345",
    "7": "1122141500",
    "11": "654321",
    "12": "141500",
    "32": "00414243",
    "37": "432109876543",
    "39": "00",
    "41": "TERM0001",
    "42": "SHOP00000000042",
    "49": "978",
    "70": "301",
    "90": "0200" + "1" * 38,
}
SPECS = [pytest.param(default_ascii, id="ascii"), pytest.param(default, id="binary")]


def encode(spec, fields: dict[str, str], mti: str = "0200") -> tuple[bytes, dict]:
    encoded, parts = iso8583.encode({"t": mti, **fields}, spec)
    return bytes(encoded), parts


def expected(parts: dict) -> bytes:
    """The message with secrets overwritten, put together from pyiso8583's own parts."""
    names = ["t", "p", *sorted((n for n in parts if n.isdigit()), key=int)]
    pieces = []
    for name in names:
        data = parts[name]["data"]
        pieces += [parts[name]["len"], b"*" * len(data) if name in SECRET else data]
    return b"".join(pieces)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", SECRET)
def test_secret_field_alone_is_overwritten(spec, name):
    message, parts = encode(spec, {**HARMLESS, name: SECRET[name]})
    masked = mask(message)
    assert parts[name]["data"] not in masked
    assert masked == expected(parts)


@pytest.mark.parametrize("spec", SPECS)
def test_all_secrets_together_are_overwritten_and_nothing_else(spec):
    message, parts = encode(spec, {**HARMLESS, **SECRET})
    masked = mask(message)
    assert masked == expected(parts)
    assert len(masked) == len(message)
    assert PAN.encode() not in masked
    for name in HARMLESS:
        assert parts[name]["data"] in masked


@pytest.mark.parametrize("spec", SPECS)
def test_message_without_secrets_is_unchanged(spec):
    message, _ = encode(spec, HARMLESS)
    assert mask(message) == message


@pytest.mark.parametrize("spec", SPECS)
def test_extended_pan_is_overwritten(spec):
    # Field 34, "Primary Account Number, Extended" in pyiso8583's own words, is a PAN.
    message, parts = encode(spec, {"3": "000000", "34": PAN})
    masked = mask(message)
    assert PAN.encode() not in masked
    assert len(masked) == len(message)
    assert masked.startswith(parts["t"]["data"] + parts["p"]["data"])


@given(
    spec=st.sampled_from([default_ascii, default]),
    secrets=st.sets(st.sampled_from(sorted(SECRET))),
    plain=st.sets(st.sampled_from(sorted(HARMLESS))),
)
def test_any_choice_of_fields_hides_just_the_secret_ones(spec, secrets, plain):
    message, parts = encode(spec, {n: {**SECRET, **HARMLESS}[n] for n in secrets | plain})
    assert mask(message) == expected(parts)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("change", [lambda m: m[:-1], lambda m: m + b"0", lambda m: b"ISO0" + m, lambda m: m[2:]])
def test_undecodable_message_is_overwritten_behind_its_type(spec, change):
    message = change(encode(spec, {**HARMLESS, **SECRET})[0])
    assert mask(message) == message[:4] + b"*" * (len(message) - 4)


def test_ebcdic_message_is_overwritten_behind_its_type():
    message = encode(default_ascii, {**HARMLESS, "2": PAN})[0].decode().encode("cp500")
    assert mask(message) == message[:4] + b"*" * (len(message) - 4)


@pytest.mark.parametrize("message", [b"", b"0", b"020", b"0200", b"0200\0"])
def test_short_message_keeps_its_length(message):
    assert mask(message) == message[:4] + b"*" * (len(message) - 4)


def ambiguous() -> bytes:
    """A binary message with a PAN in field 2 that is, byte for byte, an ASCII message without field 2.

    Its bitmap bytes are hex digits too, so read as ASCII the PAN's digits are the end of one bitmap and the
    beginning of the next, and the fields behind happen to fill the rest.
    """
    pan = "4000000000000002"
    return b"".join(
        [
            b"0200B0000000",  # binary: fields 2 7 11 12 19 20 27 28 35 36 43 44 51 52 59 60
            b"16" + pan.encode(),
            b"0000000000" + b"111111" + b"222222",  # 7, 11, 12
            b"330" + b"404" + b"0" + b"D00000000",  # 19, 20, 27, 28
            b"00" + b"000" + b"N" * 40 + b"00",  # 35, 36, 43, 44
            b"978" + b"xx10xxxx" + b"000" + b"000",  # 51, 52, 59, 60
        ]
    )


def test_message_that_decodes_both_ways_shows_no_pan():
    message = ambiguous()
    readings = {
        spec_name: iso8583.decode(message, spec)[0]
        for spec_name, spec in (("ascii", default_ascii), ("binary", default))
    }
    assert "2" not in readings["ascii"]
    pan = readings["binary"]["2"]
    masked = mask(message)
    assert pan.encode() not in masked
    assert len(masked) == len(message)


def test_third_bitmap_does_not_raise():
    # pyiso8583 reads bit 65 as a third bitmap, but its specs have no field 129: a KeyError, no DecodeError.
    third = b"\x80" + bytes(7)
    message = b"0200" + third * 3 + PAN.encode()
    assert mask(message) == b"0200" + b"*" * (len(message) - 4)


@given(st.binary(max_size=200))
def test_any_bytes_keep_their_length(message):
    masked = mask(message)
    assert len(masked) == len(message)
    # Each byte is as it was or is hidden.
    assert all(new == old or new == ord("*") for new, old in zip(masked, message, strict=True))


@given(
    bitmaps=st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=3),
    rest=st.text("0123456789 -+_=", max_size=200),
    ascii_bitmap=st.booleans(),
)
def test_anything_like_a_message_keeps_its_length(bitmaps, rest, ascii_bitmap):
    bitmap = b"".join(bitmaps)
    message = b"0200" + (bitmap.hex().encode() if ascii_bitmap else bitmap) + rest.encode()
    assert len(mask(message)) == len(message)


@pytest.mark.parametrize(("kind", "header"), [(Iso8583Codec, 2), (MpuCodec, 4)])
def test_redact_of_the_codec_masks_behind_the_length_header(kind, header):
    message, parts = encode(default, {**HARMLESS, **SECRET})
    prefix = len(message).to_bytes(2, "big") if header == 2 else b"%04d" % len(message)
    assert kind(Limits()).redact(prefix + message) == prefix + expected(parts)
