"""A key is that of the fields which pyiso8583 finds, or the spec or the message is refused: never another one."""

from __future__ import annotations

import copy
import encodings.aliases
from contextlib import suppress

import iso8583
import iso8583.specs
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from iso8583.specs import default, default_ascii

from gmux.codecs._iso8583_key import KeyReader
from gmux.errors import ConfigError, FramingError

OWN_SPECS = [spec for name, spec in vars(iso8583.specs).items() if isinstance(spec, dict) and "t" in spec]
FIELDS = {"3": "000000", "7": "1122153000", "11": "000123", "12": "153000", "13": "1122", "41": "TERM0001"}
HIGH = {"70": "301"}


def changed(spec, **fields):
    """`spec` with other properties of some fields: `f41={...}`, or just `p={...}`."""
    names = {name.removeprefix("f"): properties for name, properties in fields.items()}
    return spec | {name: spec.get(name, {}) | properties for name, properties in names.items()}


def encode(spec, fields, mti="0200") -> bytes:
    return bytes(iso8583.encode({"h": "ISO026000070", "t": mti} | fields, spec)[0])


def wanted_of(encoded, key_fields=()) -> list[str]:
    names = [str(number) for number in sorted(key_fields)] or (["11", "41"] if "41" in encoded else ["7", "11"])
    return [name for name in names if name in encoded]


def check(reader: KeyReader, spec, message: bytes, key_fields=()) -> bool:
    """Whether the key was read, and not refused, of a message; it is the one that pyiso8583 finds."""
    try:
        decoded, encoded = iso8583.decode(message, spec)
    except (iso8583.DecodeError, KeyError):
        with suppress(FramingError):
            reader.read(message, 0)
        return False
    try:
        key, is_answer = reader.read(message, 0)
    except FramingError:
        return False
    names = wanted_of(encoded, key_fields)
    mti = decoded["t"]
    kind = f"{mti[:2]}{int(mti[2]) // 2 * 2}"
    assert key == (" ".join([kind, *names]), *(encoded[name]["data"] for name in names))
    assert is_answer == bool(int(mti[2]) % 2)
    assert reader.kind(message, 0) == (kind, is_answer)
    return True


def same_place(spec, fields, key_fields=()) -> None:
    """What pyiso8583 writes by `spec` is read."""
    reader = KeyReader(spec, {"": tuple(key_fields)} if key_fields else {})
    assert check(reader, spec, encode(spec, fields), key_fields)


# Each fault by itself.


@pytest.mark.parametrize("spec", [default_ascii, default], ids=["ascii", "binary"])
@pytest.mark.parametrize("name", ["t", "p", "1"])
@pytest.mark.parametrize("wrong", [{"max_len": 0}, {"max_len": 4}, {"max_len": 12}, {"max_len": 32}, {"len_type": 2}])
@pytest.mark.parametrize("key_fields", [(), (11, 70)], ids=["low", "high"])
def test_type_and_bitmaps_are_sized_by_their_encoding(spec, name, wrong, key_fields):
    same_place(changed(spec, **{name: wrong}), FIELDS | HIGH, key_fields)


@pytest.mark.parametrize("name", ["t", "p", "1"])
def test_type_and_bitmaps_need_no_more_than_their_encoding(name):
    same_place(default_ascii | {name: {"data_enc": "ascii"}}, FIELDS | HIGH)


@pytest.mark.parametrize("base", [default_ascii, default], ids=["ascii", "binary"])
@pytest.mark.parametrize("key_fields", [(), (11, 70)], ids=["low", "high"])
@pytest.mark.parametrize("fields", [FIELDS, FIELDS | HIGH], ids=["low", "high"])
def test_third_bitmap_is_skipped(base, key_fields, fields):
    spec = changed(base, f130={"data_enc": "ascii", "len_enc": "ascii", "len_type": 0, "max_len": 5})
    same_place(spec, fields | {"130": "00011"}, key_fields)


def test_number_65_is_no_field_whatever_the_spec_has_there():
    third = b"0" * 16
    message = b"0200" + b"8020000000800000" + b"8000000000000000" + third + b"000123TERM0001"
    reader = KeyReader(default_ascii, {})
    assert check(reader, default_ascii, message)
    with pytest.raises(ConfigError, match=r"^--key-fields: 65 "):
        KeyReader(default_ascii, {"": (11, 65)})


@pytest.mark.parametrize("key_fields", [(), (11, 70)], ids=["low", "high"])
@pytest.mark.parametrize("primary", ["b", "ascii", "cp500"])
@pytest.mark.parametrize("secondary", ["b", "ascii", "cp500"])
def test_bitmaps_may_differ_in_their_encoding(primary, secondary, key_fields):
    spec = changed(default_ascii, p={"data_enc": primary}, f1={"data_enc": secondary})
    same_place(spec, FIELDS | HIGH, key_fields)


def test_second_bitmap_without_fields_is_skipped():
    message = b"0200" + b"8020000000800000" + b"0" * 16 + b"000123TERM0001"
    for key_fields in ((), (11, 70)):
        assert check(KeyReader(default_ascii, {"": key_fields}), default_ascii, message, key_fields)


def test_second_bitmap_that_the_spec_lacks_is_refused():
    spec = {name: field for name, field in default_ascii.items() if name != "1"}
    message = encode(default_ascii, FIELDS | HIGH)
    with pytest.raises(FramingError):
        KeyReader(spec, {}).read(message, 0)
    with pytest.raises(ConfigError, match=r"^--spec: field 1: .*70"):
        KeyReader(spec, {"": (11, 70)})
    same_place(spec, FIELDS)


@pytest.mark.parametrize("size", range(4 + 16, 4 + 32))
def test_message_that_ends_in_its_second_bitmap_is_refused(size):
    message = encode(default_ascii, FIELDS | HIGH)[:size]
    for key_fields in ((), (11, 70)):
        with pytest.raises(FramingError):
            KeyReader(default_ascii, {"": key_fields}).read(message, 0)


def test_message_that_ends_in_a_third_bitmap_or_field_is_refused():
    spec = changed(default_ascii, f11={"len_type": 2}, f41={"len_type": 3, "len_enc": "b"})
    whole = encode(spec, FIELDS)
    reader = KeyReader(spec, {})
    assert check(reader, spec, whole)
    for size in range(len(whole)):
        with pytest.raises(FramingError):
            reader.read(whole[:size], 0)
    with pytest.raises(FramingError):
        reader.read(b"0200" + b"8000000000000000" * 2 + b"0" * 15, 0)


@pytest.mark.parametrize("length", [b"+6", b" 6", b"6 ", b"-1", b"_6", b"0x", b"99"])
def test_length_that_only_a_lenient_reader_takes_for_a_number_is_refused(length):
    spec = changed(default_ascii, f2={"max_len": 19})
    message = b"0200" + b"4020000000800000" + length + b"000000" + b"000123TERM0001"
    with pytest.raises(FramingError):
        KeyReader(spec, {}).read(message, 0)


@pytest.mark.parametrize("length", ["٠٦", "²6"])
def test_length_in_other_digits_is_refused(length):
    raw = length.encode()
    spec = changed(default_ascii, f2={"len_enc": "utf-8", "len_type": len(raw)})
    message = b"0200" + b"4020000000800000" + raw + b"000000" + b"000123TERM0001"
    with pytest.raises(FramingError):
        KeyReader(spec, {}).read(message, 0)


def test_bitmap_may_be_in_lower_case_and_not_with_blanks():
    reader = KeyReader(default_ascii, {"": (3, 5, 7)})
    body = b"000000" + b"0" * 12 + b"1122153000"
    assert check(reader, default_ascii, b"0200" + b"2a00000000000000" + body, (3, 5, 7))
    with pytest.raises(FramingError):
        reader.read(b"0200" + b"2a 000000000000 " + body, 0)


@pytest.mark.parametrize("header", [{"len_type": 2}, {"len_type": 2, "max_len": -1}, {"max_len": -1}])
def test_header_of_no_bytes_is_none_whatever_its_length_is_written_in(header):
    same_place(changed(default_ascii, h=header), FIELDS)


@pytest.mark.parametrize(
    "header",
    [
        {"max_len": 12}, {"max_len": 99, "len_type": 2}, {"max_len": 99, "len_type": 1, "len_enc": "bcd"},
        {"max_len": 24, "len_count": "nibbles"}, {"max_len": 99, "len_type": 2, "len_enc": "cp500"},
    ],
)  # fmt: skip
def test_header_is_skipped(header):
    same_place(changed(default_ascii, h=header), FIELDS | HIGH)


@pytest.mark.parametrize("digits", [0, 1, 5, 18, 19])
@pytest.mark.parametrize("pad", ["left_pad", "right_pad"])
@pytest.mark.parametrize("length", [{"len_enc": "bcd", "len_type": 1}, {"len_enc": "b", "len_type": 2}])
def test_odd_digits_are_skipped_with_their_padding(digits, pad, length):
    packed = {"data_enc": "b", "max_len": 19, "len_count": "nibbles", pad: "0"} | length
    same_place(changed(default_ascii, f2=packed, f11=packed), FIELDS | {"2": "4" * digits, "11": "1" * digits})


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "iso2022_jp", "utf-8-sig", "utf-7"])
def test_field_may_be_in_any_encoding_as_its_length_counts_bytes(encoding):
    text = {"data_enc": encoding, "len_type": 3, "max_len": 200}
    same_place(changed(default_ascii, f3=text, f11=text), FIELDS | {"11": "日本"})


def test_fields_that_are_absent_are_told_from_empty_and_other_ones():
    text = {"len_type": 2, "max_len": 20}
    spec = changed(default_ascii, f7=text, f11=text, f41=text)
    messages = [
        {}, {"7": ""}, {"11": ""}, {"41": ""}, {"7": "", "11": ""}, {"11": "", "41": ""}, {"11": "1"}, {"41": "1"},
        {"7": "1"}, {"7": "", "11": "1"}, {"11": "1", "41": ""}, {"11": "", "41": "1"}, {"7": "1", "11": ""},
    ]  # fmt: skip
    keys = [KeyReader(spec, {}).read(encode(spec, fields), 0)[0] for fields in messages]
    # With a terminal the time is no part of the key.
    assert len(set(keys)) == len(messages)


# What is refused at start, with the field and the reason.

TEXT = {"data_enc": "ascii", "len_enc": "ascii", "len_type": 0, "max_len": 6}


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("11", None, "missing"), ("41", None, "missing"), ("t", None, "missing"), ("p", None, "missing"),
        ("h", None, "missing"), ("11", 5, "an object"), ("11", [], "an object"), ("1", "b", "an object"),
        ("48", {}, "len_type is missing"), ("48", TEXT | {"data_enc": "nonsense"}, "'nonsense'"),
        ("48", TEXT | {"data_enc": "bcd"}, "'bcd': expected b"), ("48", TEXT | {"data_enc": "rot13"}, "'rot13'"),
        ("48", TEXT | {"data_enc": "undefined"}, "'undefined'"), ("48", TEXT | {"data_enc": None}, "None"),
        ("48", TEXT | {"data_enc": "a\0b"}, "data_enc"), ("48", TEXT | {"data_enc": "\ud800"}, "data_enc"),
        ("48", TEXT | {"len_type": -1}, "-1"), ("48", TEXT | {"len_type": "2"}, "'2'"),
        ("48", TEXT | {"len_type": True}, "True"), ("48", TEXT | {"len_type": 5000}, "5000"),
        ("48", TEXT | {"max_len": -1}, "-1"), ("48", TEXT | {"max_len": 6.0}, "6.0"),
        ("48", TEXT | {"len_type": 2, "len_enc": "utf-16"}, "one byte for each digit"),
        ("48", TEXT | {"len_type": 4, "len_enc": "utf-16-le"}, "one byte for each digit"),
        ("48", TEXT | {"len_type": 2, "len_enc": "BCD"}, "'BCD'"), ("48", TEXT | {"len_type": 2, "len_enc": 1}, "1"),
        ("48", {"data_enc": "ascii", "len_type": 2, "max_len": 6}, "len_enc is missing"),
        ("48", TEXT | {"len_count": "nibble"}, "'nibble': expected bytes or nibbles"),
        ("48", TEXT | {"left_pad": 0}, "left_pad"), ("48", TEXT | {"right_pad": None}, "right_pad"),
        ("t", {"data_enc": "utf-16"}, "one byte"), ("p", {"data_enc": "utf-16-le"}, "one byte"),
        ("1", {"data_enc": "punycode"}, "one byte"), ("p", {"data_enc": "bcd"}, "expected b"), ("p", {}, "missing"),
        ("h", TEXT | {"max_len": "0"}, "'0'"), ("h", {}, "missing"),
        ("48", TEXT | {"data_enc": "two\nlines" + "x" * 1000}, "data_enc"),
    ],
)  # fmt: skip
def test_spec_that_cannot_be_read_as_pyiso8583_does_is_refused_in_one_line(name, field, said):
    spec = {key: value for key, value in (default_ascii | {name: field}).items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        KeyReader(spec, {})
    text = str(caught.value)
    assert text.startswith(f"--spec: field {name}: ")
    assert said in text
    assert text.isprintable() and len(text) < 200


# Any spec, any message.

NUMBERS = st.integers(2, 128).filter(lambda number: number != 65)
TEXT_ENCODINGS = ["ascii", "latin-1", "cp500", "cp037", "utf-8", "utf-16", "utf-16-le", "iso2022_jp", "gb18030", "idna"]
LENGTH_ENCODINGS = ["b", "bcd", *TEXT_ENCODINGS]


@st.composite
def field_specs(draw: st.DrawFn) -> dict[str, object]:
    field: dict[str, object] = {
        "data_enc": draw(st.sampled_from(["b", *TEXT_ENCODINGS])),
        "len_enc": draw(st.sampled_from(["b", "bcd", "ascii", "cp500", *LENGTH_ENCODINGS])),
        "len_type": draw(st.integers(0, 4)),
        "max_len": draw(st.integers(0, 20)),
    }
    field |= draw(st.fixed_dictionaries({}, optional={"len_count": st.sampled_from(["bytes", "nibbles", "nibbles"])}))
    return field | draw(
        st.fixed_dictionaries({}, optional={"left_pad": st.just("0"), "right_pad": st.sampled_from("0F")})
    )


#: Properties beyond the encoding are nonsense here: pyiso8583 does not look at them.
BITMAPS = st.fixed_dictionaries(
    {"data_enc": st.sampled_from(["b", "ascii", "cp500", "cp037", "latin-1"])},
    optional={"max_len": st.integers(-1, 40), "len_type": st.integers(-1, 3), "len_enc": st.just("nonsense")},
)


@st.composite
def specs(draw: st.DrawFn, numbers: set[int]) -> dict[str, dict[str, object]]:
    """One of pyiso8583's own, with some fields replaced: those of `numbers`, and others of the message."""
    spec = copy.deepcopy(draw(st.sampled_from(OWN_SPECS)))
    for name in ("t", "p", "1"):
        spec[name] = draw(st.just(spec[name]) | BITMAPS)
    spec["h"] = draw(st.just(spec["h"]) | field_specs())
    for number in numbers:
        if str(number) not in spec or draw(st.booleans()):
            spec[str(number)] = draw(field_specs())
    return spec


def values(field) -> st.SearchStrategy[str]:
    """Text for a field; of the right length for a fixed one, mostly, as far as that is known."""
    size = field["max_len"]
    nibbles = field.get("len_count") == "nibbles"
    if field["data_enc"] == "b":
        size, alphabet = size if nibbles else size * 2, "0123456789ABCDEF"
    else:
        size, alphabet = size // 2 if nibbles else size, "0123456789 AZ="
    least = 0 if field["len_type"] else size
    return st.text(alphabet, min_size=least, max_size=size)


@st.composite
def scenes(draw: st.DrawFn):
    """A spec, the key fields, and a message with what pyiso8583 wrote it from."""
    own = st.sampled_from([2, 3, 4, 7, 11, 12, 35, 37, 41, 48, 70, 90, 102, 128])
    present = draw(st.sets(own | NUMBERS | st.integers(129, 192), max_size=12))
    present |= draw(st.sets(st.sampled_from([11, 41])))
    keys = tuple(sorted(draw(st.just(set()) | st.sets(own | NUMBERS, min_size=1, max_size=4))))
    spec = draw(specs(present | set(keys)))
    fields = {str(number): draw(values(spec[str(number)])) for number in sorted(present)}
    if spec["h"]["max_len"] > 0:
        fields["h"] = draw(values(spec["h"]))
    fields["t"] = draw(
        st.sampled_from(["0100", "0110", "0200", "0210", "0421", "0430", "0800", "0810", "1804", "1814"])
    )
    try:
        message = bytes(iso8583.encode(dict(fields), spec)[0])
    except iso8583.EncodeError:
        message = None
    return spec, keys, message


def make(spec, keys) -> KeyReader | None:
    """The reader, or None where the spec is refused."""
    try:
        return KeyReader(spec, {"": keys} if keys else {})
    except ConfigError:
        event("spec refused")
        return None


@settings(max_examples=400)
@given(scenes())
def test_key_of_what_pyiso8583_writes_is_the_one_that_it_reads(scene):
    spec, keys, message = scene
    reader = make(spec, keys)
    if reader is None or message is None:
        return
    try:
        iso8583.decode(message, spec)
    except iso8583.DecodeError:
        event("pyiso8583 does not read what it wrote")
        check(reader, spec, message, keys)
        return
    event("read")
    assert check(reader, spec, message, keys)


@settings(max_examples=400)
@given(scenes(), st.data())
def test_key_of_a_changed_message_is_the_one_that_pyiso8583_reads_or_refused(scene, data):
    spec, keys, message = scene
    reader = make(spec, keys)
    if reader is None or message is None:
        return
    changed_message = bytearray(message)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(changed_message) - 1, 0)))
        piece = data.draw(st.binary(max_size=3) | st.sampled_from([b"+", b" ", b"_", b"\xf0", b"\x00", b"01", b"00"]))
        changed_message[at : at + data.draw(st.integers(0, 3))] = piece
    event("agreed" if check(reader, spec, bytes(changed_message), keys) else "refused by one")
    for size in (len(message) // 2, len(message) - 1):
        check(reader, spec, message[: max(size, 0)], keys)


@settings(max_examples=200)
@given(st.sampled_from(OWN_SPECS), st.data())
def test_key_of_any_lengths_and_bitmaps_is_the_one_that_pyiso8583_reads_or_refused(spec, data):
    """Bytes in the form of a message, not written by pyiso8583."""
    packed = spec["p"]["data_enc"] == "b"
    bits = [data.draw(st.sets(st.sampled_from([1, 2, 3, 7, 11, 32, 35, 41, 48, 63]))) for _ in range(3)]
    raw = b"".join(sum(1 << 64 - bit for bit in part).to_bytes(8, "big") for part in bits)
    raw = raw[: data.draw(st.sampled_from([8, 16, 24]))]
    body = data.draw(st.text("0123456789 +_-", max_size=60)).encode()
    body += data.draw(st.binary(max_size=60))
    check(KeyReader(spec, {}), spec, b"0200" + (raw if packed else raw.hex().encode()) + body)


@pytest.mark.parametrize("encoding", sorted(set(encodings.aliases.aliases.values())))
def test_every_encoding_of_python_is_refused_or_read_as_pyiso8583_does(encoding):
    length = {"len_enc": encoding, "len_type": 2, "max_len": 99}
    type_spec = {"data_enc": encoding}
    for change in ({"f2": length}, {"t": type_spec}, {"p": type_spec}, {"f1": type_spec}, {"f3": type_spec}):
        spec = changed(default_ascii, **change)
        try:
            reader = KeyReader(spec, {})
        except ConfigError:
            continue
        number = "4" * 16
        try:
            message = encode(spec, FIELDS | HIGH | {"2": number})
        except iso8583.EncodeError:
            continue
        assert check(reader, spec, message)
