"""What makes gmux and a target, or two clients, disagree on where a message is: and what costs more than it should.

Also here: what the codecs say of a malformed message holds nothing of the message, which may be card data.
"""

from __future__ import annotations

import re
from contextlib import suppress
from itertools import pairwise
from time import thread_time

import pytest

from gmux.codecs.base import Limits, Part
from gmux.codecs.http import HttpCodec
from gmux.codecs.iso8583 import Iso8583Codec, MpuCodec
from gmux.errors import BadAnswer, FramingError
from tests.codecs.support import by_byte, frames, in_one, in_two

HTTP = HttpCodec(Limits(), via=False)

#: A target may leave a body unread that these have: their bodies mean nothing (RFC 9110 section 9.3).
BODYLESS = (b"GET", b"HEAD", b"DELETE", b"OPTIONS", b"TRACE")

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
SENT = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n"

#: A body that is a request, for a target that takes it for one.
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"

BODIES = {
    "length": b"Content-Length: %d\r\n\r\n%b" % (len(SMUGGLED), SMUGGLED),
    "chunked": b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED),
}
NO_BODIES = {"none": b"\r\n", "length 0": b"Content-Length: 0\r\n\r\n"}

#: Head and body of answers that let the connection go on by themselves.
ANSWERS = {
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"hello"),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b""),
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    "keep-alive": (b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\n", b"hello"),
    "refusal": (b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 2\r\n\r\n", b"no"),
}
FEEDERS = [in_one, in_two, by_byte]

#: Seconds; a 64 KB read may hold the loop, and so all clients, no longer.
MAX_COST = 0.01
READ = 64 * 1024

PAN = b"4111111111111111"


def request_of(data: bytes):
    """The request in `data`, as far as it is there."""
    decoder = HTTP.request_decoder()
    decoder.receive_data(data)
    request = decoder.next_event()
    while decoder.next_event() is not None:
        pass
    return request


def last_part(decoder, request, pieces: list[bytes]) -> Part:
    decoder.request = request
    for piece in pieces:
        decoder.receive_data(piece)
        while (part := decoder.next_event()) is not None:
            if part.last:
                return part
    raise AssertionError("the answer has no end")


def ends(method: bytes, rest: bytes, answer: tuple[bytes, bytes], feeder) -> set[bool]:
    """Whether the connection may go on behind the answer, for each way to cut it."""
    head, body = answer
    data = head if method == b"HEAD" else head + body
    start = method + b" / HTTP/1.1\r\nHost: a\r\n"
    return {last_part(HTTP.answer_decoder(), request_of(start + rest), pieces).reusable for pieces in feeder(data)}


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("method", BODYLESS, ids=bytes.decode)
def test_answer_to_a_body_that_means_nothing_ends_the_upstream_connection(method, body, answer, feeder):
    assert ends(method, body, answer, feeder) == {False}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("method", BODYLESS, ids=bytes.decode)
def test_answer_to_a_long_body_that_means_nothing_ends_the_upstream_connection(method, answer):
    """One that goes on in parts."""
    assert ends(method, b"Content-Length: 300000\r\n\r\n" + bytes(10), answer, in_one) == {False}


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("body", NO_BODIES.values(), ids=NO_BODIES)
@pytest.mark.parametrize("method", BODYLESS, ids=bytes.decode)
def test_answer_to_a_request_without_body_keeps_the_upstream_connection(method, body, answer, feeder):
    assert ends(method, body, answer, feeder) == {True}


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("body", (BODIES | NO_BODIES).values(), ids=BODIES | NO_BODIES)
@pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH"], ids=bytes.decode)
def test_answer_to_a_body_that_is_due_keeps_the_upstream_connection(method, body, answer, feeder):
    assert ends(method, body, answer, feeder) == {True}


# Empty lines and polls: what is dropped must not cost.


def cost(run) -> float:
    """The least CPU seconds of a few runs: what others do on the machine is not counted."""

    def once() -> float:
        begin = thread_time()
        run()
        return thread_time() - begin

    return min(once() for _ in range(3))


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("lines", [1, 16])
def test_empty_lines_before_a_request_line_up_to_16_are_ignored(lines, feeder):
    for pieces in feeder(b"\r\n" * lines + GET):
        assert frames(HTTP.request_decoder(), pieces) == [SENT]


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("rest", [b"", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"], ids=["nothing", "request"])
def test_empty_lines_before_a_request_line_more_than_16_are_refused(rest, feeder):
    for pieces in feeder(b"\r\n" * 17 + rest):
        with pytest.raises(FramingError) as caught:
            frames(HTTP.request_decoder(), pieces)
        assert HTTP.refuse(caught.value, None).data.startswith(b"HTTP/1.1 400 ")


def test_empty_lines_are_counted_anew_for_each_request():
    data = (b"\r\n" * 16 + GET) * 3
    for feeder in (in_one, by_byte):
        for pieces in feeder(data):
            assert frames(HTTP.request_decoder(), pieces) == [SENT] * 3


def test_empty_lines_a_read_full_of_them_costs_little_and_is_refused():
    def run() -> None:
        with pytest.raises(FramingError):
            frames(HTTP.request_decoder(), [b"\r\n" * (READ // 2)])

    assert cost(run) < MAX_COST


CODECS = {
    # The message is short, so that its header begins as a poll does.
    "iso8583": (Iso8583Codec(Limits()), b"\0\0", b"\0\x05\0\0llo"),
    "mpu": (MpuCodec(Limits()), b"0000", b"000500llo"),
}


@pytest.mark.parametrize("kind", ["request", "answer"])
@pytest.mark.parametrize(("codec", "poll", "message"), CODECS.values(), ids=CODECS)
def test_polls_a_read_full_of_them_costs_little_and_is_dropped(codec, poll, message, kind):
    data = poll * (READ // len(poll))
    decoder = getattr(codec, f"{kind}_decoder")()

    def run() -> None:
        assert frames(decoder, [data]) == []
        assert len(decoder) == 0

    assert cost(run) < MAX_COST


@pytest.mark.parametrize(("codec", "poll", "message"), CODECS.values(), ids=CODECS)
def test_polls_nobody_asked_for_cost_little_and_are_no_surplus(codec, poll, message):
    data = poll * (READ // len(poll))
    decoder = codec.answer_decoder()

    def run() -> None:
        decoder.receive_data(data)
        assert not decoder.has_surplus
        assert not decoder.data

    assert cost(run) < MAX_COST


@pytest.mark.parametrize("feeder", FEEDERS)
@pytest.mark.parametrize("kind", ["request", "answer"])
@pytest.mark.parametrize(("codec", "poll", "message"), CODECS.values(), ids=CODECS)
def test_polls_among_messages_split_anywhere_are_dropped(codec, poll, message, kind, feeder):
    data = poll * 5 + message + message + poll * 2 + message + poll
    for pieces in feeder(data):
        decoder = getattr(codec, f"{kind}_decoder")()
        assert frames(decoder, pieces) == [message] * 3
        assert len(decoder) == 0


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize(("codec", "poll", "message"), CODECS.values(), ids=CODECS)
def test_polls_in_full_reads_split_anywhere_are_dropped(codec, poll, message, shift):
    data = poll * READ + message + poll * READ + message
    marks = [0, *range(READ - shift, len(data), READ), len(data)]
    pieces = [data[start:end] for start, end in pairwise(marks)]
    decoder = codec.request_decoder()
    assert frames(decoder, pieces) == [message] * 2
    assert len(decoder) == 0


# What is said of a malformed message.


def http_request(*lines: bytes) -> bytes:
    return b"\r\n".join([b"POST /pay HTTP/1.1", b"Host: a", *lines])


MALFORMED = {
    "chunk size": http_request(b"Transfer-Encoding: chunked", b"", PAN + b"x", b""),
    "chunk size of JSON": http_request(b"Transfer-Encoding: chunked", b"", b'{"pan":"' + PAN + b'"}', b""),
    "chunk size too large": http_request(b"Transfer-Encoding: chunked", b"", PAN, b""),
    "end of chunk": http_request(b"Transfer-Encoding: chunked", b"", b"1", b"x" + PAN, b""),
    "trailer": http_request(b"Transfer-Encoding: chunked", b"", b"0", b"X " + PAN + b"=2512", b"", b""),
    "forbidden trailer": http_request(b"Transfer-Encoding: chunked", b"", b"0", b"Cookie: " + PAN, b"", b""),
    "coding": http_request(b"Transfer-Encoding: " + PAN, b"", b""),
    "coding below chunked": http_request(b"Transfer-Encoding: " + PAN + b", chunked", b"", b""),
    "coding behind chunked": http_request(b"Transfer-Encoding: chunked, " + PAN, b"", b""),
    "length": http_request(b"Content-Length: " + PAN + b"x", b"", b""),
    "field with a control character": http_request(b"X-Card: " + PAN + b"\x01", b"", b""),
    "field without colon": http_request(PAN, b"", b""),
    "name with underscore, ours": http_request(b"Content_Length: " + PAN, b"", b""),
    "name with a blank": http_request(PAN + b" : 1", b"", b""),
    "host": b"GET / HTTP/1.1\r\nHost: " + PAN + b" 1\r\n\r\n",
    "version": b"GET /" + PAN + b" HTTP/" + PAN + b"\r\n\r\n",
    "target": b"GET " + PAN + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "no request": PAN + b"=2512101\r\n\r\n",
    "no request, not whole": PAN + b"=2512101\n",
    "no request line": b"GET " + PAN + b" x y\r\n\r\n",
}

MALFORMED_ANSWERS = {
    "status line": b"HTTP/1.1 " + PAN + b" OK\r\n\r\n",
    "no answer": PAN + b"\r\n\r\n",
    "field": b"HTTP/1.1 200 OK\r\n" + PAN + b"\r\n\r\n",
    "name with underscore": b"HTTP/1.1 200 OK\r\nContent_Length: " + PAN + b"\r\n\r\n",
    "coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: " + PAN + b", chunked\r\n\r\n",
    "chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + PAN + b"x\r\n",
    "trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX " + PAN + b"\r\n\r\n",
}


def assert_says_nothing(error: Exception) -> None:
    """Not of the card number, nor of a part of it."""
    for text in (str(error), repr(error)):
        assert not re.search(r"4111|1111", text), text


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_malformed_request_is_refused_without_its_bytes(data):
    with pytest.raises(FramingError) as caught:
        frames(HTTP.request_decoder(), [data])
    assert_says_nothing(caught.value)
    assert PAN not in HTTP.refuse(caught.value, None).data


@pytest.mark.parametrize("data", MALFORMED_ANSWERS.values(), ids=MALFORMED_ANSWERS)
def test_malformed_answer_is_refused_without_its_bytes(data):
    decoder = HTTP.answer_decoder()
    decoder.request = request_of(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    with pytest.raises(BadAnswer) as caught:
        frames(decoder, [data])
    assert_says_nothing(caught.value)


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:" + b" " * 30_000 + b"\rX\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: a" + b" " * 30_000 + b"b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: " + b"\t, " * 10_000 + b"\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nConnection: " + b", " * 15_000 + b"\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTE: " + b" ," * 15_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: " + b"a" * 30_000 + b"/\r\n\r\n",
        b"GET http://" + b"a" * 8_000 + b"/ HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1" + b" " * 250 + b"\x01\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"A:" + b" " * 30_000 + b"\x01\r\n",
    ],
    ids=["no CRLF", "blanks inside", "commas", "connection", "te", "host", "absolute", "chunk", "trailer"],
)
def test_head_that_is_made_to_be_slow_costs_little(head):
    """A pattern that goes back over blanks takes minutes for a head of 12 KB, and all clients wait."""

    def run() -> None:
        decoder = HTTP.request_decoder()
        decoder.receive_data(head)
        with suppress(FramingError):
            while decoder.next_event() is not None:
                pass

    assert cost(run) < MAX_COST


@pytest.mark.parametrize(
    "accept", [b"a" * 30_000, b", " * 15_000, b"application/json;" + b" " * 29_000 + b"q", b";q=" * 10_000]
)
def test_refusal_of_a_request_that_is_made_to_be_slow_costs_little(accept):
    request = request_of(b"GET / HTTP/1.1\r\nHost: a\r\nAccept: " + accept + b"\r\n\r\n")
    assert cost(lambda: HTTP.refuse(FramingError("why"), request)) < MAX_COST


@pytest.mark.parametrize("value", [b"timeout=" + b"1" * 900, b"timeout" * 120, b" " * 900, b"a=" * 450])
def test_keep_alive_that_is_made_to_be_slow_costs_little(value):
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nKeep-Alive: " + value + b"\r\n\r\n"
    request = request_of(GET)

    def run() -> None:
        decoder = HTTP.answer_decoder()
        decoder.request = request
        decoder.receive_data(answer)
        decoder.next_event()

    assert cost(run) < MAX_COST
