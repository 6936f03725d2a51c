"""echo, iso8583 and mpu: where messages begin and end, however the bytes arrive."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux.codecs.base import Limits, Part, Request
from gmux.codecs.echo import EchoCodec
from gmux.codecs.iso8583 import Iso8583Codec, MpuCodec
from gmux.errors import BadAnswer, FramingError, MessageTooLarge, RequestTimeout

from .support import FEEDERS, cuts, frames


def wrap_echo(body: bytes) -> bytes:
    return body.replace(b"\n", b" ") + b"\n"


def wrap_iso8583(body: bytes) -> bytes:
    return len(body).to_bytes(2, "big") + body


def wrap_mpu(body: bytes) -> bytes:
    return b"%04d" % len(body) + body


CODECS = {EchoCodec: wrap_echo, Iso8583Codec: wrap_iso8583, MpuCodec: wrap_mpu}
POLLS = {Iso8583Codec: b"\0\0", MpuCodec: b"0000"}
BODIES = [b"a", b"0800\x82\x20" + bytes(range(40)), b"0000", b"\0\0", b"0012" * 3, b"x" * 300]

codecs = pytest.mark.parametrize("kind", CODECS)
sides = pytest.mark.parametrize("side", ["request_decoder", "answer_decoder"])


def make(kind, max_message: int = 4096):
    return kind(Limits(max_message=max_message))


@pytest.mark.parametrize("feed", FEEDERS)
@sides
@codecs
def test_messages_cut_anywhere_come_out_equal(kind, side, feed):
    messages = [CODECS[kind](body) for body in BODIES]
    for pieces in feed(b"".join(messages)):
        assert frames(getattr(make(kind), side)(), pieces) == messages


@given(bodies=st.lists(st.binary(min_size=1, max_size=60), max_size=8), data=st.data())
@sides
@codecs
def test_messages_in_random_cuts_come_out_equal(kind, side, bodies, data):
    # Such as begin with this have no type: a client's answer would go nowhere.
    messages = [CODECS[kind](b"-" + body) for body in bodies]
    pieces = data.draw(cuts(b"".join(messages)))
    decoder = getattr(make(kind), side)()
    assert frames(decoder, pieces) == messages
    assert len(decoder) == 0


@codecs
def test_decoders_events_are_whole_requests_and_last_parts(kind):
    message = CODECS[kind](b"hello")
    requests, answers = make(kind).request_decoder(), make(kind).answer_decoder()
    requests.receive_data(message)
    answers.receive_data(message)
    request, part = requests.next_event(), answers.next_event()
    assert type(request) is Request
    assert request.whole
    # None of these protocols says that a request does no harm when it is done twice (invariant 5).
    assert not request.repeatable
    assert not request.close
    assert type(part) is Part
    assert part.last
    assert part.reusable
    assert not part.close
    assert requests.take_owed() == b""


@sides
@codecs
def test_bytes_of_the_next_message_are_kept_for_it(kind, side):
    first, second = CODECS[kind](b"first"), CODECS[kind](b"second")
    decoder = getattr(make(kind), side)()
    assert frames(decoder, [first + second[:3]]) == [first]
    assert len(decoder) == 3
    assert frames(decoder, [second[3:]]) == [second]
    assert len(decoder) == 0


@codecs
def test_answer_decoder_with_bytes_nobody_asked_for_has_surplus(kind):
    answer = CODECS[kind](b"answer")
    decoder = make(kind).answer_decoder()
    assert not decoder.has_surplus
    decoder.receive_data(answer + answer[:1])
    assert decoder.has_surplus
    assert decoder.next_event().data == answer
    assert decoder.has_surplus


@codecs
def test_answer_decoder_at_a_message_boundary_has_no_surplus(kind):
    decoder = make(kind).answer_decoder()
    assert len(frames(decoder, [CODECS[kind](b"answer")])) == 1
    assert not decoder.has_surplus


@codecs
def test_answer_that_ends_early_is_bad(kind):
    decoder = make(kind).answer_decoder()
    assert frames(decoder, [CODECS[kind](b"answer")[:-1]]) == []
    with pytest.raises(BadAnswer):
        decoder.receive_eof()


@codecs
def test_refusal_closes_and_says_nothing(kind):
    refusal = make(kind).refuse(RequestTimeout("late"), None)
    assert (refusal.data, refusal.close) == (b"", True)


# Limits.


def body_of(kind, size: int) -> bytes:
    """The body whose message counts `size` bytes: echo counts its line feed, the others not their header."""
    return b"7" * (size - 1 if kind is EchoCodec else size)


@pytest.mark.parametrize("feed", FEEDERS[:2])
@codecs
def test_message_of_exactly_the_maximum_passes(kind, feed):
    message = CODECS[kind](body_of(kind, 1000))
    for pieces in feed(message * 2):
        assert frames(make(kind, 1000).request_decoder(), pieces) == [message, message]


@pytest.mark.parametrize("feed", FEEDERS[:2])
@codecs
def test_message_one_above_the_maximum_is_too_large(kind, feed):
    message = CODECS[kind](body_of(kind, 1001))
    for pieces in feed(message):
        with pytest.raises(MessageTooLarge):
            frames(make(kind, 1000).request_decoder(), pieces)
        with pytest.raises(BadAnswer):
            frames(make(kind, 1000).answer_decoder(), pieces)


@pytest.mark.parametrize("kind", POLLS)
def test_header_one_above_the_maximum_is_refused_before_its_body(kind):
    with pytest.raises(MessageTooLarge):
        frames(make(kind, 1000).request_decoder(), [CODECS[kind](b"7" * 1001)[:4]])


def test_line_without_end_is_refused_at_one_above_the_maximum():
    decoder = make(EchoCodec, 1000).request_decoder()
    assert frames(decoder, [b"7" * 1000]) == []
    with pytest.raises(MessageTooLarge):
        frames(decoder, [b"7"])


def test_iso8583_of_65535_bytes_and_mpu_of_9999_pass():
    for kind, size in ((Iso8583Codec, 65535), (MpuCodec, 9999)):
        message = CODECS[kind](b"7" * size)
        assert frames(make(kind, 1 << 20).request_decoder(), [message]) == [message]


# Headers of mpu: all that int() would take and the protocol does not.

BAD_HEADERS = [
    b"+012",
    b"-001",
    b" 12 ",
    b"12  ",
    b"1_00",
    b"0x10",
    b"1.e2",
    b"12\n ",
    b"\0\0\0\1",
    b"12\xb2\xb3",
    b"\xd9\xa1\xd9\xa2",
]


@pytest.mark.parametrize("header", BAD_HEADERS)
def test_mpu_header_other_than_4_ascii_digits_is_refused(header):
    for pieces in ([header + b"x" * 200], [header[:3], header[3:]]):
        with pytest.raises(FramingError):
            frames(make(MpuCodec).request_decoder(), pieces)
        with pytest.raises(BadAnswer):
            frames(make(MpuCodec).answer_decoder(), pieces)


# Polls: a length of zero.


@pytest.mark.parametrize("feed", FEEDERS)
@sides
@pytest.mark.parametrize("kind", POLLS)
def test_polls_between_messages_are_dropped(kind, side, feed):
    poll, message = POLLS[kind], CODECS[kind](b"body")
    for pieces in feed(poll + message + poll * 3 + message + poll):
        decoder = getattr(make(kind), side)()
        assert frames(decoder, pieces) == [message, message]
        assert len(decoder) == 0


@pytest.mark.parametrize("kind", POLLS)
def test_polls_on_an_idle_upstream_connection_are_no_surplus(kind):
    decoder = make(kind).answer_decoder()
    decoder.receive_data(POLLS[kind] * 2)
    assert not decoder.has_surplus
    assert len(decoder) == 0


@pytest.mark.parametrize("kind", POLLS)
def test_half_a_poll_on_an_idle_upstream_connection_is_surplus(kind):
    # It may as well be the beginning of an answer that nobody asked for; the other half decides too late.
    decoder = make(kind).answer_decoder()
    decoder.receive_data(POLLS[kind] + POLLS[kind][:1])
    assert decoder.has_surplus


@pytest.mark.parametrize("kind", POLLS)
def test_poll_before_an_unasked_message_does_not_hide_it(kind):
    decoder = make(kind).answer_decoder()
    decoder.receive_data(POLLS[kind] + CODECS[kind](b"body"))
    assert decoder.has_surplus


# Anything at all.


@given(data=st.data(), raw=st.binary(min_size=1, max_size=120))
@sides
@codecs
def test_any_bytes_give_messages_or_the_error_of_their_side(kind, side, data, raw):
    decoder = getattr(make(kind, 64), side)()
    error = FramingError if side == "request_decoder" else BadAnswer
    pieces = data.draw(cuts(raw))
    try:
        found = frames(decoder, pieces)
    except error:
        return
    # Nothing is invented, and nothing lost but polls.
    rest = decoder.peek(len(decoder))
    poll = POLLS.get(kind)
    assert len(b"".join(found)) + len(rest) <= len(raw)
    if poll is None:
        assert b"".join(found) + rest == raw
    for frame in found:
        assert frame in raw


# Cost.


def test_long_line_in_small_pieces_costs_linear_time():
    line = b"x" * (4 << 20) + b"\n"
    decoder = make(EchoCodec, len(line)).request_decoder()
    began = time.process_time()
    found = frames(decoder, [line[at : at + 64] for at in range(0, len(line), 64)])
    assert found == [line]
    # A search from the start each time would take minutes.
    assert time.process_time() - began < 10


@codecs
def test_many_small_messages_in_one_piece_cost_linear_time(kind):
    message = CODECS[kind](b"x")
    decoder = make(kind).request_decoder()
    decoder.receive_data(message[:1])  # makes the rest land in the bytearray
    began = time.process_time()
    found = frames(decoder, [message[1:] + message * 200_000])
    assert len(found) == 200_001
    assert time.process_time() - began < 10
