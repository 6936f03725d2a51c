"""How an ISO 8583 answer is told to be that of a request: message types and key fields, read by a spec."""

from __future__ import annotations

import copy
from contextlib import suppress
from timeit import repeat

import iso8583
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from iso8583.specs import default, default_ascii

from gmux.codecs._iso8583_key import KeyReader
from gmux.codecs.base import HANDLED, KeyedPart, KeyedRequest, Limits, Unsolicited
from gmux.codecs.iso8583 import Iso8583Codec, MpuCodec
from gmux.errors import BadAnswer, ConfigError, FramingError

STAN, TERMINAL = "000123", "TERM0001"
FIELDS = {"11": STAN, "41": TERMINAL}


def bcd_spec():
    """Digits packed in two to a byte, as many hosts have them; bitmaps in binary."""
    spec = copy.deepcopy(default)
    for name, digits in {"t": 4, "3": 6, "4": 12, "7": 10, "11": 6, "12": 6, "13": 4}.items():
        spec[name] = spec[name] | {"data_enc": "b", "max_len": digits, "len_count": "nibbles", "left_pad": "0"}
    spec["t"] = spec["t"] | {"max_len": 2, "len_count": "bytes"}
    spec["2"] = spec["2"] | {
        "data_enc": "b",
        "len_enc": "bcd",
        "len_type": 1,
        "len_count": "nibbles",
        "right_pad": "F",
    }
    spec["35"] = spec["35"] | {"len_enc": "b", "len_type": 1}
    return spec


def ebcdic_spec():
    return {
        name: field | {"data_enc": "cp500" if field["data_enc"] == "ascii" else "b", "len_enc": "cp500"}
        for name, field in default.items()
    }


def header_spec():
    """A header of its own before the message type."""
    return default_ascii | {"h": default_ascii["h"] | {"max_len": 12}}


SPECS = {
    "ascii": default_ascii,
    "binary": default,
    "bcd": bcd_spec(),
    "ebcdic": ebcdic_spec(),
    "header": header_spec(),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def encode(spec, mti: str, **fields: str) -> bytes:
    named = {name.lstrip("f"): value for name, value in fields.items()}
    header = {"h": "ISO026000070"} if spec["h"]["max_len"] else {}
    return bytes(iso8583.encode(header | named | {"t": mti}, spec)[0])


def key(message: bytes, spec=default_ascii, fields=()):
    return KeyReader(spec, dict(fields)).read(message, 0)


PAIRS = [
    ("0100", "0110"), ("0200", "0210"), ("0220", "0230"), ("0400", "0410"), ("0420", "0430"), ("0800", "0810"),
    ("1100", "1110"), ("1220", "1230"), ("1420", "1430"), ("1804", "1814"), ("2200", "2210"), ("0201", "0210"),
    ("0421", "0430"), ("0401", "0411"), ("0820", "0830"),
]  # fmt: skip


@each_spec
@pytest.mark.parametrize(("asks", "answers"), PAIRS)
def test_key_of_an_answer_is_that_of_its_request(asks, answers, spec):
    more = {"f2": "4111111111111111", "f3": "000000", "f4": "000000001000", "f35": "4111111111111111=2512"}
    request = key(encode(spec, asks, f11=STAN, f41=TERMINAL, **more), spec)
    answer = key(encode(spec, answers, f11=STAN, f39="00", f41=TERMINAL, f54="x"), spec)
    assert request[0] == answer[0]
    assert (request[1], answer[1]) == (False, True)


DIFFERENT = [("0200", "0410"), ("0200", "0230"), ("0200", "0110"), ("0200", "1210"), ("0400", "0430"), ("0800", "0210")]


@pytest.mark.parametrize(("asks", "answers"), DIFFERENT)
def test_key_of_another_kind_of_message_differs(asks, answers):
    """A reversal repeats the number of its purchase, and has its own answer."""
    assert key(encode(default_ascii, asks, f11=STAN))[0] != key(encode(default_ascii, answers, f11=STAN))[0]


@each_spec
@pytest.mark.parametrize("change", [{"f11": "000124"}, {"f41": "TERM0002"}])
def test_key_differs_by_number_and_terminal(change, spec):
    one = {"f11": STAN, "f41": TERMINAL}
    assert key(encode(spec, "0200", **one), spec) != key(encode(spec, "0200", **one | change), spec)


@each_spec
def test_key_without_terminal_has_the_time(spec):
    """As most network messages."""
    one = {"f7": "1122153000", "f11": STAN, "f70": "301"}
    same = key(encode(spec, "0800", **one), spec)[0]
    assert same == key(encode(spec, "0810", **one, f39="00"), spec)[0]
    assert same != key(encode(spec, "0810", **one | {"f7": "1122153001"}), spec)[0]
    # With a terminal the time is no part of it: some hosts put their own in the answer.
    one["f41"] = TERMINAL
    assert key(encode(spec, "0800", **one), spec) == key(encode(spec, "0800", **one | {"f7": "1122153001"}), spec)


def test_key_fields_that_are_absent_are_told_from_those_that_are_empty_or_others():
    messages = [
        {}, {"f11": STAN}, {"f7": "1122153000"}, {"f41": TERMINAL}, {"f11": STAN, "f41": TERMINAL},
        {"f7": "1122153000", "f11": STAN},
    ]  # fmt: skip
    assert len({key(encode(default_ascii, "0200", **fields))[0] for fields in messages}) == len(messages)


@each_spec
def test_key_fields_of_the_operator_replace_the_default(spec):
    fields = {"": (37,), "0800": (7, 70)}
    one = {"f7": "1122153000", "f11": STAN, "f37": "000000000001", "f41": TERMINAL, "f70": "301"}
    other = one | {"f11": "999999", "f41": "TERM0009"}
    for asks, answers in (("0200", "0210"), ("0800", "0810")):
        assert (
            key(encode(spec, asks, **one), spec, fields.items())[0]
            == (key(encode(spec, answers, **other), spec, fields.items())[0])
        )
    changed = one | {"f70": "001"}
    assert key(encode(spec, "0800", **one), spec, fields.items()) != (
        key(encode(spec, "0800", **changed), spec, fields.items())
    )
    assert key(encode(spec, "0200", **one), spec, fields.items()) == (
        key(encode(spec, "0200", **changed), spec, fields.items())
    )


@each_spec
@given(data=st.data())
def test_key_fields_are_those_that_a_whole_decoding_finds(spec, data):
    """Any fields before, between and behind them."""
    names = data.draw(st.sets(st.sampled_from(["2", "3", "4", "7", "11", "12", "13", "35", "37", "41", "48", "70"])))
    lengths = {
        "2": 16,
        "3": 6,
        "4": 12,
        "7": 10,
        "11": 6,
        "12": 6,
        "13": 4,
        "35": 20,
        "37": 12,
        "41": 8,
        "48": 5,
        "70": 3,
    }
    digits = st.integers(1, 9).map(str)
    fields = {name: data.draw(digits) * lengths[name] for name in names}
    header = {"h": "ISO026000070"} if spec["h"]["max_len"] else {}
    message, encoded = iso8583.encode(header | fields | {"t": "0200"}, spec)
    wanted = ["11", "41"] if "41" in names else ["7", "11"]
    values = tuple(encoded[name]["data"] for name in wanted if name in names)
    assert key(bytes(message), spec)[0][1:] == values


@pytest.mark.parametrize(
    "message",
    [
        b"", b"02", b"0200", b"020x0020000000800000", b"\xff" * 40, b"02000020", b"0200zzzzzzzzzzzzzzzz",
        b"0200002000000080000012345", b"02000020000000800000123456TERM000", b"0200402000000080000099",
        b"02004020000000800000x9" + b"1" * 60, b"0200402000000080000020" + b"1" * 60,
        b"0200-020000000800000" + b"1" * 30,
        b"02004020000000800000-1" + b"1" * 60, b"02004020000000800000+3" + b"1" * 60,
        *(b"0200" + bitmap + b"1" * 30 for bitmap in (b"0x20000000800000", b"+020000000800000", b" 020000000800000",
                                                     b"0000200000008_00", b"\t020000000800000")),
        "0200²020000000800000".encode(),
    ],
)  # fmt: skip
def test_key_of_what_is_no_message_is_refused(message):
    with pytest.raises(FramingError) as caught:
        key(message)
    assert "1" * 4 not in str(caught.value), "no data of the message may be told"


@given(st.binary(max_size=80))
def test_key_of_any_bytes_is_a_key_or_a_framing_error(data):
    for spec in (default_ascii, default):
        with suppress(FramingError):
            key(data, spec)


@pytest.mark.parametrize(
    "change",
    [
        {"11": None}, {"41": {}}, {"11": {"data_enc": "nonsense", "len_enc": "ascii", "len_type": 0, "max_len": 6}},
        {"p": None}, {"t": None}, {"h": None},
        {"41": {"data_enc": "ascii", "len_enc": "ascii", "len_type": -1, "max_len": 8}},
        {"41": {"data_enc": "ascii", "len_enc": "ascii", "len_type": "2", "max_len": 8}}, {"41": 5}, {"41": []},
    ],
)  # fmt: skip
def test_spec_that_cannot_be_used_is_told_at_start(change):
    spec = {name: field for name, field in (default_ascii | change).items() if field is not None}
    with pytest.raises(ConfigError, match=r"^--spec: "):
        Iso8583Codec(Limits(), correlation="key", spec=spec)


@pytest.mark.parametrize("codec", [Iso8583Codec, MpuCodec])
def test_codec_by_key_gives_each_message_its_key(codec):
    header = (lambda n: n.to_bytes(2, "big")) if codec is Iso8583Codec else (lambda n: b"%04d" % n)
    made = codec(Limits(), correlation="key")
    assert made.correlation == "key"
    frames = [header(len(m)) + m for m in (encode(default_ascii, mti, f11=STAN) for mti in ("0200", "0210", "0800"))]
    requests, answers = made.request_decoder(), made.answer_decoder()
    requests.receive_data(frames[0])
    request = requests.next_event()
    assert isinstance(request, KeyedRequest) and request.data == frames[0]
    answers.receive_data(frames[1] + frames[2])
    answer, own = answers.next_event(), answers.next_event()
    assert isinstance(answer, KeyedPart) and answer.key == request.key
    assert isinstance(own, Unsolicited) and not own.is_answer
    # A client's answer is nobody's.
    requests.receive_data(frames[1])
    assert requests.next_event() is HANDLED
    answers.receive_data(header(4) + b"oops")
    with pytest.raises(BadAnswer):
        answers.next_event()


def test_codec_by_order_reads_no_field():
    made = Iso8583Codec(Limits())
    assert made.correlation == "order"
    requests = made.request_decoder()
    requests.receive_data(b"\0\4oops")
    assert requests.next_event().data == b"\0\4oops"


def test_key_is_read_in_a_few_microseconds():
    """A partial decoding: a whole one costs some fifty. The bound is for a busy machine."""
    read = KeyReader(default_ascii, {}).read
    message = encode(default_ascii, "0200", f2="4111111111111111", f11=STAN, f41=TERMINAL, f48="x" * 900)
    assert min(repeat(lambda: read(message, 0), number=100, repeat=20)) / 100 < 50e-6


def test_key_fields_above_64_keep_no_data_of_messages_that_have_none():
    """Plans are kept by message type and bitmaps (two for one with two bitmaps); what is behind them is card data."""
    reader = KeyReader(default_ascii, {"": (11, 70)})
    for number in range(50):
        reader.read(encode(default_ascii, "0200", f2=f"41111111111{number:05}", f11=STAN), 0)
    reader.read(encode(default_ascii, "0800", f11=STAN, f70="301"), 0)
    assert reader._plan.cache_info().currsize == 3


def test_spec_without_a_field_that_a_message_has_refuses_the_message():
    spec = {name: field for name, field in default_ascii.items() if name != "22"}
    with pytest.raises(FramingError):
        key(encode(default_ascii, "0200", f11=STAN, f22="051", f41=TERMINAL), spec)
    assert key(encode(default_ascii, "0200", f11=STAN, f41=TERMINAL), spec)


def describe(message: bytes, spec=default_ascii, fields=(), at=0) -> str:
    return KeyReader(spec, dict(fields)).describe(message, at)


@each_spec
def test_kind_is_read_from_header_and_type_alone(spec):
    for mti, kind in {
        "0200": ("020", False),
        "0210": ("020", True),
        "0431": ("042", True),
        "1804": ("180", False),
    }.items():
        reader = KeyReader(spec, {})
        header = len("ISO026000070") if spec["h"]["max_len"] else 0
        size = header + (2 if spec["t"]["data_enc"] == "b" else 4)
        message = b"\0\0" + encode(spec, mti, f11=STAN)[:size]
        assert reader.kind(message, 2) == kind
        with pytest.raises(FramingError):
            reader.kind(message[:-1], 2)


@each_spec
def test_description_has_the_type_and_the_key_fields(spec):
    assert describe(b"\0\0" + encode(spec, "0201", f2="4111111111111111", f11=STAN, f41=TERMINAL), spec, at=2) == (
        "0201, 11=000123, 41=TERM0001"
    )
    assert describe(encode(spec, "0810", f7="1122153000", f11=STAN), spec) == "0810, 7=1122153000, 11=000123"
    assert describe(encode(spec, "0800"), spec) == "0800"


def test_description_has_no_card_data():
    key_fields = {"": (2, 11, 34, 35, 36, 45, 52, 55, 70)}
    fields = {"f2": "4111111111111111", "f35": "4111111111111111=2512", "f52": "0123456789ABCDEF", "f11": STAN}
    assert describe(encode(default_ascii, "0200", f70="301", **fields), fields=key_fields.items()) == (
        "0200, 11=000123, 70=301"
    )


def test_description_by_a_wrong_spec_shows_no_card_number():
    """A card number that is taken for another field."""
    message = encode(default_ascii, "0200", f11=STAN, f102="4111111111111111")
    assert describe(message, fields={"": (11, 102)}.items()) == "0200, 11=000123, 102=****************"


def test_description_of_a_value_that_is_not_printable_is_hexadecimal():
    message = encode(default_ascii, "0200", f11=STAN, f41="T\n\x1b[31mX")
    assert describe(message) == "0200, 11=000123, 41=540a1b5b33316d58"
    long = encode(default_ascii, "0200", f11=STAN, f48="x" * 900)
    assert describe(long, fields={"": (11, 48)}.items()) == f"0200, 11=000123, 48={'x' * 16}..."


def test_description_tells_what_can_be_read():
    message = encode(default_ascii, "0800", f11=STAN, f41=TERMINAL)
    assert describe(message[:-1]) == "0800"
    assert describe(message[:4]) == "0800"
    assert describe(message[:3]) == "3 bytes, whose type cannot be read"
    assert describe(b"\0\0" + b"x" * 37, at=2) == "37 bytes, whose type cannot be read"
    assert describe(b"", at=2) == "0 bytes, whose type cannot be read"


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda body: b"0200" + b"F" * 16 + body), st.integers(0, 4))
@example(b"0200" + b"7" * 16 + b"99" + b"9" * 400, 0)
def test_description_of_any_bytes_is_short_and_printable(data, at):
    for spec in SPECS.values():
        for fields in ((), tuple(range(3, 60))):
            text = describe(data, spec, {"": fields}.items() if fields else (), at)
            assert text.isascii() and text.isprintable() and len(text) <= 200


def test_description_is_short_however_many_key_fields_there_are():
    fields = {f"f{number}": "x" * 100 for number in range(104, 124)}
    text = describe(encode(default_ascii, "0200", **fields), fields={"": tuple(range(104, 124))}.items())
    assert text.startswith("0200, 104=xxx") and len(text) <= 200
