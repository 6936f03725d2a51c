"""What the target's HTTP answers become on their way to the client, given the request: a table by RFC section.

The next answer on the connection belongs to another client, so an answer whose end is in doubt is none. Every case is
fed whole, byte by byte and in random cuts.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from gmux.codecs.base import Interim, Limits, Request
from gmux.codecs.http import HttpCodec
from gmux.errors import BadAnswer

from .test_http_requests import by_name, feedings, message

LIMITS = Limits(max_message=100, max_head=512)

CLOSE, KEEP = True, False
REUSE, DROP = True, False
#: How an answer ends: with its last byte, or with the connection.
BYTES, EOF = "bytes", "eof"

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n"
GET_CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
GET_10 = b"GET / HTTP/1.0\r\n\r\n"
HEAD_10 = b"HEAD / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
GET_10_KEEP = b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
OPTIONS = b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"


def ok(*fields: bytes, body: bytes = b"") -> bytes:
    return message(b"HTTP/1.1 200 OK", *fields, body=body)


def ok_10(*fields: bytes, body: bytes = b"") -> bytes:
    return message(b"HTTP/1.0 200 OK", *fields, body=body)


LENGTH = b"Content-Length: 2"
CHUNKED = b"Transfer-Encoding: chunked"
ENDS = b"Connection: close"
STAYS = b"Connection: keep-alive"
SHORT = ok(LENGTH, body=b"ok")
CHUNKS = b"2\r\nok\r\n0\r\n\r\n"


class Good(NamedTuple):
    name: str
    request: bytes
    answer: bytes
    out: bytes | None = None  # None: as it came
    close: bool = KEEP
    reusable: bool = REUSE
    end: str = BYTES


#: Names begin with the RFC section. `close` ends the client's connection, `reusable` keeps the target's.
GOOD = [
    # Lengths.
    Good("9112-6.3 a length", GET, SHORT),
    Good("9112-6.3 no body", GET, ok(b"Content-Length: 0")),
    Good("9112-6.3 leading zeros", GET, ok(b"Content-Length: 02", body=b"ok"), SHORT),
    Good("9112-6.3 a body that looks like an answer", GET, ok(b"Content-Length: %d" % len(SHORT), body=SHORT)),
    Good("9112-6.3 a body above the limit of requests", GET, ok(b"Content-Length: 300", body=b"x" * 300)),
    Good("9110-9.3.2 HEAD with a length", HEAD, ok(b"Content-Length: 5")),
    Good("9110-9.3.2 HEAD with chunked", HEAD, ok(CHUNKED)),
    Good("9110-9.3.2 HEAD with neither", HEAD, ok()),
    Good("9110-9.3.2 HEAD of HTTP/1.0 with chunked", HEAD_10, ok(CHUNKED), ok(STAYS)),
    Good("9110-9.3.7 OPTIONS *", OPTIONS, ok(b"Allow: GET", b"Content-Length: 0")),
    Good("9110-15.3.5 204", GET, message(b"HTTP/1.1 204 No Content")),
    Good(
        "9110-8.6 204 with a length of 0",
        GET,
        message(b"HTTP/1.1 204 No Content", b"A: 1", b"Content-Length: 0"),
        message(b"HTTP/1.1 204 No Content", b"A: 1"),
    ),
    Good(
        "9110-8.6 204 with a length",
        GET,
        message(b"HTTP/1.1 204 No Content", b"Content-Length: 5"),
        message(b"HTTP/1.1 204 No Content"),
        reusable=DROP,
    ),
    Good(
        "9112-6.1 204 with chunked",
        GET,
        message(b"HTTP/1.1 204 No Content", CHUNKED),
        message(b"HTTP/1.1 204 No Content"),
        reusable=DROP,
    ),
    Good(
        "9110-8.6 204 with a length, to HEAD",
        HEAD,
        message(b"HTTP/1.1 204 No Content", b"Content-Length: 5"),
        message(b"HTTP/1.1 204 No Content"),
        reusable=DROP,
    ),
    Good("9110-15.4.5 304 with a length", GET, message(b"HTTP/1.1 304 Not Modified", b"Content-Length: 5")),
    Good("9110-15.4.5 304 with chunked", GET, message(b"HTTP/1.1 304 Not Modified", CHUNKED)),
    Good("9110-15.4.5 304 with neither", GET, message(b"HTTP/1.1 304 Not Modified")),
    Good("9110-15.3.6 205 with a body", GET, message(b"HTTP/1.1 205 Reset Content", LENGTH, body=b"ok")),
    # Chunks.
    Good("9112-7.1 chunked", GET, ok(CHUNKED, body=CHUNKS)),
    Good("9112-7.1 chunks", GET, ok(CHUNKED, body=b"1\r\no\r\n1;x=y\r\nk\r\n00\r\n\r\n"), ok(CHUNKED, body=CHUNKS)),
    Good("9112-7.1 no chunk but the last", GET, ok(CHUNKED, body=b"0\r\n\r\n")),
    Good(
        "9112-7 chunked in capitals",
        GET,
        ok(b"TRANSFER-ENCODING: Chunked", body=CHUNKS),
        ok(b"TRANSFER-ENCODING: chunked", body=CHUNKS),
    ),
    Good("9112-7.1.2 trailers pass", GET, ok(CHUNKED, body=b"2\r\nok\r\n0\r\nX-Sum: 1\r\n\r\n")),
    Good("9112-7.1 chunks above the limit of requests", GET, ok(CHUNKED, body=b"c8\r\n%b\r\n0\r\n\r\n" % (b"x" * 200))),
    Good("9112-7.1 chunked to HTTP/1.0", GET_10, ok(CHUNKED, body=CHUNKS), ok(ENDS, body=b"ok"), CLOSE),
    Good(
        "9112-7.1 chunked to HTTP/1.0 with keep-alive",
        GET_10_KEEP,
        ok(b"A: 1", CHUNKED, b"B: 2", body=CHUNKS),
        ok(b"A: 1", b"B: 2", ENDS, body=b"ok"),
        CLOSE,
    ),
    Good(
        "9112-7.1.2 trailers to HTTP/1.0",
        GET_10,
        ok(CHUNKED, body=b"2\r\nok\r\n0\r\nA: b\r\n\r\n"),
        ok(ENDS, body=b"ok"),
        CLOSE,
    ),
    # Until close.
    Good("9112-6.3 until close", GET, ok(body=b"ok"), ok(CHUNKED, body=CHUNKS), KEEP, DROP, EOF),
    Good("9112-6.3 until close, empty", GET, ok(), ok(CHUNKED, body=b"0\r\n\r\n"), KEEP, DROP, EOF),
    Good(
        "9112-6.3 until close, with keep-alive", GET, ok(STAYS, body=b"ok"), ok(CHUNKED, body=CHUNKS), KEEP, DROP, EOF
    ),
    Good("9112-6.3 until close to HTTP/1.0", GET_10, ok(body=b"ok"), ok(ENDS, body=b"ok"), CLOSE, DROP, EOF),
    Good(
        "9112-6.3 until close to HTTP/1.0 with keep-alive",
        GET_10_KEEP,
        ok(body=b"ok"),
        ok(ENDS, body=b"ok"),
        CLOSE,
        DROP,
        EOF,
    ),
    Good("9112-6.3 until close of HTTP/1.0", GET, ok_10(body=b"ok"), ok(CHUNKED, body=CHUNKS), KEEP, DROP, EOF),
    # Whose connection ends.
    Good("9112-9.6 the target closes", GET, ok(ENDS, LENGTH, body=b"ok"), SHORT, KEEP, DROP),
    Good(
        "9112-9.6 the target closes, in a list", GET, ok(b"Connection: x, Close", LENGTH, body=b"ok"), SHORT, KEEP, DROP
    ),
    Good(
        "9112-9.6 the target closes behind chunks",
        GET,
        ok(ENDS, CHUNKED, body=CHUNKS),
        ok(CHUNKED, body=CHUNKS),
        KEEP,
        DROP,
    ),
    Good("9112-9.6 the target closes behind HEAD", HEAD, ok(ENDS, LENGTH), ok(LENGTH), KEEP, DROP),
    Good("9112-9.6 the client closes", GET_CLOSE, SHORT, ok(LENGTH, ENDS, body=b"ok"), CLOSE),
    Good(
        "9112-9.6 the client closes behind chunks",
        GET_CLOSE,
        ok(CHUNKED, body=CHUNKS),
        ok(CHUNKED, ENDS, body=CHUNKS),
        CLOSE,
    ),
    Good("9112-9.6 both close", GET_CLOSE, ok(ENDS, LENGTH, body=b"ok"), ok(LENGTH, ENDS, body=b"ok"), CLOSE, DROP),
    Good("9112-9.3 HTTP/1.0 target", GET, ok_10(LENGTH, body=b"ok"), SHORT, KEEP, DROP),
    Good("9112-9.3 HTTP/1.0 target with keep-alive", GET, ok_10(STAYS, LENGTH, body=b"ok"), SHORT),
    Good(
        "9112-9.3 HTTP/1.0 target with both",
        GET,
        ok_10(b"Connection: keep-alive, close", LENGTH, body=b"ok"),
        SHORT,
        KEEP,
        DROP,
    ),
    Good("9112-9.3 HTTP/1.0 client", GET_10, SHORT, ok(LENGTH, ENDS, body=b"ok"), CLOSE),
    Good("9112-9.3 HTTP/1.0 client with keep-alive", GET_10_KEEP, SHORT, ok(LENGTH, STAYS, body=b"ok")),
    # Interim answers.
    Good("9110-15.2 103 passes", GET, message(b"HTTP/1.1 103 Early Hints", b"Link: a") + SHORT),
    Good("9110-15.2 two of 103", GET, message(b"HTTP/1.1 103 Early Hints", b"A: b") * 2 + SHORT),
    Good(
        "9110-15.2 102 loses its hop-by-hop fields",
        GET,
        message(b"HTTP/1.1 102 Processing", STAYS) + SHORT,
        message(b"HTTP/1.1 102 Processing") + SHORT,
    ),
    Good(
        "9110-15.2 103 with a length of 0",
        GET,
        message(b"HTTP/1.1 103 E", b"Content-Length: 0") + SHORT,
        message(b"HTTP/1.1 103 E") + SHORT,
    ),
    Good("9110-15.2.1 100 was answered already", GET, message(b"HTTP/1.1 100 Continue") + SHORT, SHORT),
    Good(
        "9110-15.2.1 100 between others",
        GET,
        message(b"HTTP/1.1 103 E") + message(b"HTTP/1.1 100 C") * 2 + SHORT,
        message(b"HTTP/1.1 103 E") + SHORT,
    ),
    Good(
        "9110-15.2 no interim answer to HTTP/1.0",
        GET_10,
        message(b"HTTP/1.1 103 E") + SHORT,
        ok(LENGTH, ENDS, body=b"ok"),
        CLOSE,
    ),
    Good("9110-15.2 103 before HEAD", HEAD, message(b"HTTP/1.1 103 E") + ok(LENGTH)),
    # Fields and status lines.
    Good(
        "9110-5.3 order, case and repetition",
        GET,
        ok(b"b: 1", b"Set-Cookie: x", LENGTH, b"Set-Cookie: y", b"B: 2", body=b"ok"),
    ),
    Good(
        "9110-7.6.1 hop-by-hop fields",
        GET,
        ok(
            b"Keep-Alive: timeout=5",
            b"Connection: x-a, keep-alive",
            b"X-A: 1",
            b"Upgrade: h2c",
            b"Proxy-Connection: x",
            LENGTH,
            body=b"ok",
        ),
        SHORT,
    ),
    Good(
        "9110-7.6.1 Content-Length is never taken away",
        GET,
        ok(b"Connection: content-length", LENGTH, body=b"ok"),
        SHORT,
    ),
    Good("9110-7.2 Host in an answer says nothing", GET, ok(b"Host: a/b c", b"Host: d", LENGTH, body=b"ok")),
    Good("9110-5.5 bytes above ASCII", GET, ok(b"X: \xff", LENGTH, body=b"ok")),
    Good("9112-4 no reason", GET, message(b"HTTP/1.1 200 ", LENGTH, body=b"ok")),
    Good(
        "9112-4 not even the blank of a reason",
        GET,
        message(b"HTTP/1.1 200", LENGTH, body=b"ok"),
        message(b"HTTP/1.1 200 ", LENGTH, body=b"ok"),
    ),
    Good("9112-4 a long reason", GET, message(b"HTTP/1.1 404 Not \xc3\xa4 here", LENGTH, body=b"ok")),
    Good("9110-15 a status that nobody knows", GET, message(b"HTTP/1.1 599 X", LENGTH, body=b"ok")),
    Good("9110-15.6 an error", GET, message(b"HTTP/1.1 503 X", b"Retry-After: 9", b"Content-Length: 0")),
]

#: Name, request, answer: as a whole, without an end of the connection, not an answer.
BAD: list[tuple[str, bytes, bytes]] = [
    ("9112-6.3 both", GET, ok(LENGTH, CHUNKED, body=CHUNKS)),
    ("9112-6.3 both, the other way", GET, ok(CHUNKED, LENGTH, body=CHUNKS)),
    ("9112-6.3 both to HEAD", HEAD, ok(CHUNKED, LENGTH)),
    ("9112-6.3 a length twice, equal", GET, ok(LENGTH, LENGTH, body=b"ok")),
    ("9112-6.3 two lengths", GET, ok(LENGTH, b"content-length: 3", body=b"ok?")),
    ("9112-6.3 a list of lengths", GET, ok(b"Content-Length: 2, 2", body=b"ok")),
    ("9110-8.6 a plus", GET, ok(b"Content-Length: +2", body=b"ok")),
    ("9110-8.6 a minus", GET, ok(b"Content-Length: -2", body=b"ok")),
    ("9110-8.6 no digits", GET, ok(b"Content-Length:", body=b"ok")),
    ("9110-8.6 hex", GET, ok(b"Content-Length: 0x2", body=b"ok")),
    ("9110-8.6 19 digits", GET, ok(b"Content-Length: 1000000000000000000")),
    ("9110-5.1 a length in the spelling of CGI", GET, ok(b"Content_Length: 2", body=b"ok")),
    ("9112-6.1 chunked in two fields", GET, ok(CHUNKED, CHUNKED, body=CHUNKS)),
    ("9112-6.1 chunked twice", GET, ok(b"Transfer-Encoding: chunked, chunked", body=CHUNKS)),
    ("9112-6.1 gzip, chunked", GET, ok(b"Transfer-Encoding: gzip, chunked", body=CHUNKS)),
    ("9112-6.1 identity", GET, ok(b"Transfer-Encoding: identity", body=b"ok")),
    ("9112-6.1 no coding", GET, ok(b"Transfer-Encoding:", body=b"ok")),
    ("9112-6.1 in HTTP/1.0", GET, ok_10(CHUNKED, body=CHUNKS)),
    ("9110-15.2.2 101", GET, message(b"HTTP/1.1 101 Switching Protocols", b"Upgrade: websocket")),
    ("9110-15.2 103 with a length", GET, message(b"HTTP/1.1 103 E", b"Content-Length: 2", body=b"ok") + SHORT),
    ("9110-15.2 103 with a length and nothing behind it", GET, message(b"HTTP/1.1 103 E", LENGTH) + SHORT),
    ("9110-15.2 100 with chunked and nothing behind it", GET, message(b"HTTP/1.1 100 C", CHUNKED) + SHORT),
    ("9110-15.2 100 with chunked", GET, message(b"HTTP/1.1 100 C", CHUNKED, body=CHUNKS) + SHORT),
    ("9112-4 nothing that HTTP has", GET, b"hello\r\n\r\n"),
    ("9112-4 another protocol", GET, message(b"ICY 200 OK", LENGTH, body=b"ok")),
    ("9112-2.3 HTTP/2.0", GET, message(b"HTTP/2.0 200 OK", LENGTH, body=b"ok")),
    ("9112-2.3 HTTP/1.2", GET, message(b"HTTP/1.2 200 OK", LENGTH, body=b"ok")),
    ("9112-2.3 small letters", GET, message(b"http/1.1 200 OK", LENGTH, body=b"ok")),
    ("9112-4 a status of two digits", GET, message(b"HTTP/1.1 20 OK", LENGTH, body=b"ok")),
    ("9112-4 a status of four digits", GET, message(b"HTTP/1.1 2000 OK", LENGTH, body=b"ok")),
    ("9112-4 a status below 100", GET, message(b"HTTP/1.1 099 OK", LENGTH, body=b"ok")),
    ("9112-4 half a version", GET, b"HTTP\r\n\r\n"),
    ("9112-4 a version alone", GET, b"HTTP/1.1\r\n\r\n"),
    ("9112-4 a blank for a status", GET, b"HTTP/1.1 \r\n\r\n"),
    ("9112-4 a status below 100, interim", GET, message(b"HTTP/1.1 099 OK") + SHORT),
    ("9112-4 two blanks before the status", GET, message(b"HTTP/1.1  200 OK", LENGTH, body=b"ok")),
    ("9112-4 a tab before the status", GET, message(b"HTTP/1.1\t200 OK", LENGTH, body=b"ok")),
    ("9112-4 no blank before the reason", GET, message(b"HTTP/1.1 200OK", LENGTH, body=b"ok")),
    ("9110-15.2 interim answers without end", GET, message(b"HTTP/1.1 103 E") * 33 + SHORT),
    ("9112-4 no status", GET, message(b"HTTP/1.1 OK", LENGTH, body=b"ok")),
    ("9112-4 an empty line first", GET, b"\r\n" + SHORT),
    ("9112-4 bytes of the last answer first", GET, b"x" + SHORT),
    ("9112-4 a control character in the reason", GET, message(b"HTTP/1.1 200 O\x01K", LENGTH, body=b"ok")),
    ("9112-2.2 bare CR in the reason", GET, message(b"HTTP/1.1 200 O\rK", LENGTH, body=b"ok")),
    ("9112-2.2 bare LF behind the status line", GET, b"HTTP/1.1 200 OK\nContent-Length: 2\r\n\r\nok"),
    ("9112-2.2 bare LF everywhere", GET, b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
    ("9112-2.2 bare CR in a value", GET, ok(b"X: a\rb", LENGTH, body=b"ok")),
    ("9112-5.2 obs-fold", GET, ok(b"X: a\r\n b", LENGTH, body=b"ok")),
    ("9112-5.1 a blank before the colon", GET, ok(b"Content-Length : 2", body=b"ok")),
    ("9110-5.1 no colon", GET, ok(b"X", LENGTH, body=b"ok")),
    ("9110-5.1 no name", GET, ok(b": x", LENGTH, body=b"ok")),
    ("9110-5.5 NUL in a value", GET, ok(b"X: \0", LENGTH, body=b"ok")),
    ("6585-5 a head above the limit", GET, ok(b"X: " + b"x" * 600)),
    ("6585-5 a head without an end", GET, b"HTTP/1.1 200 OK\r\nX: " + b"x" * 600),
]  # fmt: skip

#: Chunked bodies that are none: name, body. Their heads may be out already, so a client must see no end of them.
BAD_CHUNKS: list[tuple[str, bytes]] = [
    ("9112-7.1 a plus", b"+2\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1 0x", b"0x2\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1 no size", b"\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1 a blank before the size", b" 2\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1 2**64 + 2", b"10000000000000002\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1 bare LF behind the size", b"2\nok\r\n0\r\n\r\n"),
    ("9112-7.1 two other bytes behind the data", b"2\r\nokXY0\r\n\r\n"),
    ("9112-7.1 no CRLF behind the data", b"2\r\nok0\r\n\r\n"),
    ("9112-7.1 data longer than its size", b"1\r\nok\r\n0\r\n\r\n"),
    ("9112-7.1.1 a long extension", b"2;%b\r\nok\r\n0\r\n\r\n" % (b"x" * 300)),
    ("9112-7.1.2 a trailer that ends the message elsewhere", b"0\r\nContent-Length: 5\r\n\r\n"),
    ("9112-7.1.2 trailers above the limit", b"0\r\n%b\r\n" % (b"A: b\r\n" * 100)),
    ("9112-7.1.2 an answer for a trailer", b"0\r\n" + SHORT),
]

#: Where the end of the connection comes too soon: name, request, what came until then.
CUT: list[tuple[str, bytes, bytes]] = [
    ("9112-8 nothing", GET, b""),
    ("9112-8 half a status line", GET, b"HTTP/1.1 20"),
    ("9112-8 half a head", GET, b"HTTP/1.1 200 OK\r\nContent-"),
    ("9112-8 half the end of a head", GET, b"HTTP/1.1 200 OK\r\n\r"),
    ("9112-8 an interim answer alone", GET, message(b"HTTP/1.1 103 E")),
    ("9112-8 100 alone", GET, message(b"HTTP/1.1 100 C")),
    ("9112-8 a head alone", GET, ok(LENGTH)),
    ("9112-8 a byte less than the length", GET, ok(LENGTH, body=b"o")),
    ("9112-8 a byte less than the length, of HTTP/1.0", GET, ok_10(LENGTH, body=b"o")),
    ("9112-8 no chunk", GET, ok(CHUNKED)),
    ("9112-8 half a chunk", GET, ok(CHUNKED, body=b"2\r\no")),
    ("9112-8 no last chunk", GET, ok(CHUNKED, body=b"2\r\nok\r\n")),
    ("9112-8 half a last chunk", GET, ok(CHUNKED, body=b"2\r\nok\r\n0\r\n")),
    ("9112-8 half a trailer", GET, ok(CHUNKED, body=b"2\r\nok\r\n0\r\nA: b")),
    ("9112-8 no last chunk, to HTTP/1.0", GET_10, ok(CHUNKED, body=b"2\r\nok\r\n")),
]


def decoder_for(raw: bytes):
    """A decoder of the answer to `raw`."""
    codec = HttpCodec(LIMITS, via=False)
    requests, answers = codec.request_decoder(), codec.answer_decoder()
    requests.receive_data(raw)
    request = requests.next_event()
    assert isinstance(request, Request) and request.whole
    answers.request = request
    return answers


def run(decoder, pieces: list[bytes], end: str = BYTES):
    """What goes to the client, and the last part; the last part is None when the answer is not complete."""
    out = b""
    for piece in [*pieces, None]:
        if piece is not None:
            decoder.receive_data(piece)
        elif end == EOF:
            decoder.receive_eof()
        while (part := decoder.next_event()) is not None:
            out += part.data
            if part.last:
                assert piece is pieces[-1] if end == BYTES else piece is None, "the answer ended too soon"
                return out, part
    return out, None


def merge_chunks(sent: bytes) -> bytes:
    """`sent` with the chunks of its body made one: gmux makes a new one of each read. Fails when they are not valid."""
    head, end, rest = sent.partition(b"\r\n\r\n")
    if not re.search(rb"\r\ntransfer-encoding: chunked(\r\n|$)", head, re.IGNORECASE):
        return sent
    data = b""
    while (size := re.match(rb"([1-9a-f][0-9a-f]*)\r\n", rest)) is not None:
        stop = size.end() + int(size[1], 16)
        data += rest[size.end() : stop]
        assert rest[stop : stop + 2] == b"\r\n", f"a chunk without an end in {sent!r}"
        rest = rest[stop + 2 :]
    assert re.fullmatch(rb"0\r\n([^\r\n]+\r\n)*\r\n", rest), f"no last chunk in {sent!r}"
    return head + end + (b"%x\r\n%b\r\n" % (len(data), data) if data else b"") + rest


def merged(out: bytes) -> bytes:
    """`out` with the chunks of its last answer made one."""
    interim = b""
    while out.startswith(b"HTTP/1.1 1"):
        head, end, out = out.partition(b"\r\n\r\n")
        interim += head + end
    has_body = out.partition(b"\r\n\r\n")[2] != b""
    return interim + (merge_chunks(out) if has_body else out)


def test_tables_of_answers_names_are_distinct():
    for table in (GOOD, BAD, BAD_CHUNKS, CUT):
        names = [row[0] for row in table]
        assert sorted(set(names)) == sorted(names)


@by_name(GOOD)
def test_answer_valid_goes_to_the_client_byte_for_byte(case):
    for pieces in feedings(case.answer, case.name):
        decoder = decoder_for(case.request)
        out, last = run(decoder, pieces, case.end)
        assert last is not None, pieces
        assert merged(out) == (case.out or case.answer), pieces
        assert (last.close, last.reusable) == (case.close, case.reusable), pieces
        assert not decoder.has_surplus


@by_name([case for case in GOOD if case.end == BYTES])
def test_answer_with_bytes_behind_it_leaves_them_as_surplus(case):
    """They are for nobody: the upstream connection ends of them."""
    decoder = decoder_for(case.request)
    decoder.receive_data(case.answer + SHORT)
    out = b""
    while (part := decoder.next_event()) is not None:
        out += part.data
        if part.last:
            break
    assert merged(out) == (case.out or case.answer)
    assert decoder.has_surplus
    assert len(decoder) == len(SHORT)


@by_name([case for case in GOOD if case.end == BYTES])
def test_answer_cut_off_is_no_answer(case):
    """A byte is missing when the target closes: what went to the client has no end that it could take for one."""
    decoder = decoder_for(case.request)
    with pytest.raises(BadAnswer):
        run(decoder, [case.answer[:-1]], EOF)


@by_name([case for case in GOOD if case.end == BYTES])
def test_answer_behind_another_on_one_connection_is_its_own(case):
    """What a decoder keeps from one answer must not colour the next, whatever that was."""
    decoder = decoder_for(case.request)
    for request, expected in ((case.request, case), (GET, GOOD[0]), (case.request, case)):
        request_decoder = HttpCodec(LIMITS, via=False).request_decoder()
        request_decoder.receive_data(request)
        decoder.request = request_decoder.next_event()
        out, last = run(decoder, [expected.answer])
        assert merged(out) == (expected.out or expected.answer)
        assert (last.close, last.reusable) == (expected.close, expected.reusable)


@by_name(BAD)
def test_answer_malformed_is_refused(case):
    name, request, raw = case
    for pieces in feedings(raw, name):
        with pytest.raises(BadAnswer):
            run(decoder_for(request), pieces)


@pytest.mark.parametrize("request_", [GET, GET_10], ids=["1.1", "1.0"])
@by_name(BAD_CHUNKS)
def test_answer_with_malformed_chunks_is_refused(case, request_):
    name, body = case
    for pieces in feedings(ok(CHUNKED, body=body), name):
        with pytest.raises(BadAnswer):
            run(decoder_for(request_), pieces)


@by_name(CUT)
def test_answer_ended_by_the_connection_too_soon_is_refused(case):
    name, request, raw = case
    for pieces in feedings(raw, name) if raw else [[]]:
        with pytest.raises(BadAnswer, match="the target closed the connection"):
            run(decoder_for(request), pieces, EOF)


@by_name(CUT)
def test_answer_incomplete_has_no_last_part(case):
    name, request, raw = case
    for pieces in feedings(raw, name) if raw else [[]]:
        out, last = run(decoder_for(request), pieces)
        assert last is None
        assert not out.endswith(b"0\r\n\r\n")


def test_answer_at_the_limit_of_a_head_passes():
    head = ok(b"X: " + b"x" * (512 - len(ok(b"X: ", b"Content-Length: 0"))), b"Content-Length: 0")
    assert len(head) == 512
    for pieces in feedings(head, "limit"):
        out, last = run(decoder_for(GET), pieces)
        assert (out, last.reusable) == (head, True)


def test_answer_until_close_goes_on_while_it_comes():
    """A client must not wait for the end of what may have none for hours."""
    decoder = decoder_for(GET)
    decoder.receive_data(ok())
    assert decoder.next_event().data == ok(CHUNKED)
    for piece in (b"a", b"bc"):
        decoder.receive_data(piece)
        part = decoder.next_event()
        assert (part.data, part.last) == (b"%x\r\n%b\r\n" % (len(piece), piece), False)
        assert decoder.next_event() is None


def test_answer_with_a_length_goes_on_while_it_comes():
    decoder = decoder_for(GET)
    decoder.receive_data(ok(LENGTH))
    assert decoder.next_event().data == ok(LENGTH)
    decoder.receive_data(b"o")
    part = decoder.next_event()
    assert (part.data, part.last) == (b"o", False)
    decoder.receive_data(b"k")
    part = decoder.next_event()
    assert (part.data, part.last) == (b"k", True)


@pytest.mark.parametrize(
    ("request_", "interim"),
    [(GET, b"HTTP/1.1 100 Continue\r\n\r\n"), (GET_10, b"HTTP/1.1 103 E\r\nLink: a\r\n\r\n")],
    ids=["100", "103 to HTTP/1.0"],
)
def test_answer_that_has_begun_with_what_is_dropped_has_begun(request_, interim):
    """A request may go twice only where no byte of its answer came; an empty part is the sign of one that did."""
    decoder = decoder_for(request_)
    decoder.receive_data(interim)
    part = decoder.next_event()
    assert (part.data, part.last) == (b"", False)
    assert decoder.next_event() is None


def test_answer_that_is_interim_is_told_from_the_beginning_of_one():
    """Behind an interim answer a client can still be told that there is none; behind a head it cannot."""
    decoder = decoder_for(GET)
    decoder.receive_data(message(b"HTTP/1.1 103 E") + ok(LENGTH))
    interim, head = decoder.next_event(), decoder.next_event()
    assert isinstance(interim, Interim) and interim.data
    assert not isinstance(head, Interim) and not head.last
