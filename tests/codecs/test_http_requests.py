"""What HTTP requests become on their way to the target, byte for byte, and which are refused: a table by RFC section.

Many clients share one connection, so a request that two parsers could read in two ways is an attack: what goes on is
written anew, and what is doubtful does not go on at all. Every case is fed whole, byte by byte and in random cuts.
"""

from __future__ import annotations

import os
import random
from itertools import pairwise

import pytest

from gmux.codecs._http_request import CONTINUE
from gmux.codecs.base import Limits, Part, Request
from gmux.codecs.http import HttpCodec
from gmux.errors import (
    AnswerTimeout,
    BadAnswer,
    ConnectError,
    ConnectTimeout,
    ExpectationFailed,
    FramingError,
    HeadTooLarge,
    MessageTooLarge,
    Overloaded,
    QueueTimeout,
    RequestTimeout,
    TargetNameTooLong,
    Unsupported,
    UpstreamClosed,
    VersionUnsupported,
)
from tests.support import strict_http

from .support import by_byte, in_one

#: Set GMUX_TEST_SEED to repeat the cuts of a failed run; it is printed.
SEED = int(os.environ.get("GMUX_TEST_SEED") or random.randrange(1 << 32))
CUTS = 12

LIMITS = Limits(max_message=100, max_head=16 * 1024)
SMALL_HEADS = Limits(max_message=100, max_head=256)

BAD = FramingError
NEXT = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n"


def message(*lines: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def get(*fields: bytes, target: bytes = b"/") -> bytes:
    return message(b"GET " + target + b" HTTP/1.1", b"Host: a", *fields)


def post(*fields: bytes, body: bytes = b"hello") -> bytes:
    return message(b"POST / HTTP/1.1", b"Host: a", *fields, body=body)


def chunked(body: bytes) -> bytes:
    return post(b"Transfer-Encoding: chunked", body=body)


def sized(size: int, limit_name: bytes = b"GET / HTTP/1.1\r\nHost: a\r\nX: ") -> bytes:
    """A head of exactly `size` bytes."""
    return limit_name + b"x" * (size - len(limit_name) - 4) + b"\r\n\r\n"


def sized_of(body: bytes, *fields: bytes) -> bytes:
    """What a chunked request with this body becomes: it is here whole, so its length is known."""
    return post(*fields, b"Content-Length: %d" % len(body), body=body)


TENS = (b"x" * 10, b"y" * 11)
SIZED = post(b"Content-Length: 5")
HELLO = chunked(b"5\r\nhello\r\n0\r\n\r\n")

#: Name (RFC section first), what comes, and the requests that go on; None is what comes.
ACCEPTED: list[tuple[str, bytes, list[bytes] | None]] = [
    # Methods and targets.
    ("9110-9.3.1 GET", get(), None),
    ("9110-9.3.2 HEAD", message(b"HEAD / HTTP/1.1", b"Host: a"), None),
    ("9110-9.3.3 POST with a length", post(b"Content-Length: 5"), None),
    ("9110-9.3.4 PUT without a body", message(b"PUT /a HTTP/1.1", b"Host: a", b"Content-Length: 0"), None),
    ("9110-9.3.5 DELETE", message(b"DELETE /a?b=c HTTP/1.1", b"Host: a"), None),
    ("9110-9.3.8 TRACE", message(b"TRACE / HTTP/1.1", b"Host: a"), None),
    ("9110-16.1 a method of another RFC", message(b"M-SEARCH / HTTP/1.1", b"Host: a"), None),
    ("9112-3.2.1 origin-form with all that may be in it", get(target=b"/a/../%2e?x=1&y=[|]{}~!$'()*+,;:@"), None),
    ("9112-3.2.1 a path that begins like an authority", get(target=b"//b/c"), None),
    (
        "9112-3.2.2 absolute-form stands above Host",
        message(b"GET http://b:81/x?y HTTP/1.1", b"A: 1", b"Host: a"),
        [message(b"GET /x?y HTTP/1.1", b"Host: b:81", b"A: 1")],
    ),
    ("9112-3.2.2 absolute-form without a path", get(target=b"HTTP://b"), [message(b"GET / HTTP/1.1", b"Host: b")]),
    (
        "9112-3.2.2 absolute-form with a query alone",
        get(target=b"http://[::1]:8?q"),
        [message(b"GET /?q HTTP/1.1", b"Host: [::1]:8")],
    ),
    ("9112-3.2.4 OPTIONS *", message(b"OPTIONS * HTTP/1.1", b"Host: a"), None),
    (
        "9112-3.2.4 OPTIONS of a host",
        message(b"OPTIONS http://b HTTP/1.1", b"Host: a"),
        [message(b"OPTIONS * HTTP/1.1", b"Host: b")],
    ),
    # Host and versions.
    ("9112-3.2 empty Host", message(b"GET / HTTP/1.1", b"Host: "), None),
    ("9112-3.2 Host with a port", message(b"GET / HTTP/1.1", b"Host: a.b-c_d:65535"), None),
    ("9110-7.2 Host in IPv6", message(b"GET / HTTP/1.1", b"Host: [fe80::1]:80"), None),
    (
        "9112-2.3 HTTP/1.0 goes on as 1.1",
        message(b"GET / HTTP/1.0", b"Host: a"),
        [message(b"GET / HTTP/1.1", b"Host: a")],
    ),
    (
        "9112-3.2 HTTP/1.0 without Host gets an empty one",
        message(b"GET / HTTP/1.0", b"A: 1"),
        [message(b"GET / HTTP/1.1", b"Host:", b"A: 1")],
    ),
    (
        "9112-3.2.2 HTTP/1.0 in absolute-form without Host",
        message(b"GET http://b/ HTTP/1.0"),
        [message(b"GET / HTTP/1.1", b"Host: b")],
    ),
    (
        "9112-9.3 HTTP/1.0 with keep-alive",
        message(b"GET / HTTP/1.0", b"Connection: keep-alive", b"Keep-Alive: 5", b"Host: a"),
        [message(b"GET / HTTP/1.1", b"Host: a")],
    ),
    (
        "9112-6.3 HTTP/1.0 with a length",
        message(b"POST / HTTP/1.0", b"Content-Length: 2", body=b"ok"),
        [message(b"POST / HTTP/1.1", b"Host:", b"Content-Length: 2", body=b"ok")],
    ),
    # Fields.
    ("9110-5.3 order, case and repetition", get(b"b: 1", b"A: 2", b"B: 3", b"a: 2"), None),
    ("9110-5.5 bytes above ASCII in a value", get(b"X: \xc3\xa4\xff"), None),
    ("9110-5.5 two blanks in a value", get(b"X: a  b"), None),
    ("9112-5.1 blanks around a value", get(b"X:\t a\tb \t", b"Y:"), [get(b"X: a\tb", b"Y: ")]),
    ("9110-5.1 an underscore in a name", get(b"X_Y: 1"), None),
    ("9110-5.4 99 fields and Host", get(*[b"A: b"] * 99), None),
    ("9112-2.2 empty lines before a request", b"\r\n\r\n" + get(), [get()]),
    ("9112-6.3 a GET with a body", get(b"Content-Length: 2") + b"ok", None),
    (
        "9110-7.6.1 hop-by-hop fields",
        get(
            b"Connection: keep-alive",
            b"Keep-Alive: 5",
            b"A: 1",
            b"Proxy-Connection: close",
            b"TE: trailers",
            b"Upgrade: h2c",
            b"HTTP2-Settings: x",
            b"B: 2",
        ),
        [get(b"A: 1", b"B: 2", b"TE: trailers")],
    ),
    (
        "9110-7.6.1 fields that Connection names",
        get(b"X-A: 1", b"x-b: 2", b"C: 3", b"X-A: 4", b"Connection: x-a , X-B,,close"),
        [get(b"C: 3")],
    ),
    ("9110-7.6.1 Connection twice", get(b"Connection: b", b"B: 1", b"Connection: c", b"C: 1"), [get()]),
    ("9110-7.6.1 Connection twice, close last", get(b"Connection: b", b"B: 1", b"Connection: close"), [get()]),
    ("9110-7.6.1 Host is not taken away with others", get(b"Connection: host, b", b"B: 1"), [get()]),
    (
        "9110-7.6.1 a length is not taken away with others",
        post(b"B: 1", b"Content-Length: 5", b"Connection: b, Content-Length"),
        [SIZED],
    ),
    ("9110-7.6.1 Host is never taken away", get(b"Connection: host, close"), [get()]),
    (
        "9110-7.6.1 Content-Length is never taken away",
        post(b"Content-Length: 5", b"Connection: content-length"),
        [post(b"Content-Length: 5")],
    ),
    (
        "9110-7.6.1 Transfer-Encoding is never taken away",
        post(b"Connection: Transfer-Encoding", b"Transfer-Encoding: chunked", body=b"1\r\nx\r\n0\r\n\r\n"),
        [sized_of(b"x")],
    ),
    ("9110-10.1.1 Expect stays here", post(b"Expect: 100-continue", b"Content-Length: 5"), [SIZED]),
    # Content-Length.
    ("9112-6.3 leading zeros", post(b"Content-Length: 0005"), [post(b"Content-Length: 5")]),
    ("9112-6.3 blanks around a length", post(b"Content-Length:\t5 \t"), [post(b"Content-Length: 5")]),
    ("9112-6.3 a body that looks like a request", post(b"Content-Length: %d" % len(NEXT), body=NEXT), None),
    ("9112-6.3 a body at the limit", post(b"Content-Length: 100", body=b"x" * 100), None),
    # Chunks.
    ("9112-7.1 chunked", HELLO, [SIZED]),
    ("9112-7.1 chunks", chunked(b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"), [SIZED]),
    ("9112-7.1 no chunk but the last", chunked(b"0\r\n\r\n"), [sized_of(b"")]),
    ("9112-7.1 zeros", chunked(b"0000000000005\r\nhello\r\n000\r\n\r\n"), [SIZED]),
    (
        "9112-7.1 hex in both cases",
        chunked(b"a\r\n%b\r\nB\r\n%b\r\n0\r\n\r\n" % TENS),
        [sized_of(b"".join(TENS))],
    ),
    (
        "9112-7 chunked in capitals",
        post(b"transfer-encoding:  CHUNKED", b"A: 1", body=b"0\r\n\r\n"),
        [sized_of(b"", b"A: 1")],
    ),
    (
        "9112-7.1.1 extensions are dropped",
        chunked(b'5;a=b;c="d e"\r\nhello\r\n0 ;x\r\n\r\n'),
        [SIZED],
    ),
    ("9112-7.1.1 an extension at the limit", chunked(b"5;%b\r\nhello\r\n0\r\n\r\n" % (b"x" * 252)), [SIZED]),
    ("9112-7.1.2 trailers pass", chunked(b"0\r\nX-Sum: 1\r\nx-other: \xff a\r\n\r\n"), None),
    (
        "9112-5.1 blanks around the value of a trailer",
        chunked(b"0\r\nX:\t a \t\r\ny:\r\n\r\n"),
        [chunked(b"0\r\nX: a\r\ny: \r\n\r\n")],
    ),
    (
        "9112-7.1.2 trailers behind data pass",
        chunked(b"2\r\nhe\r\n3\r\nllo\r\n0\r\nA: b\r\n\r\n"),
        [chunked(b"5\r\nhello\r\n0\r\nA: b\r\n\r\n")],
    ),
    ("9112-7.1 a chunk that looks like the end", chunked(b"5\r\n0\r\n\r\n\r\n0\r\n\r\n"), [sized_of(b"0\r\n\r\n")]),
    ("9112-7.1 a chunk that is a request", chunked(b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT)), [sized_of(NEXT)]),
    ("9112-7.1 chunked at the limit", chunked(b"64\r\n%b\r\n0\r\n\r\n" % (b"x" * 100)), [sized_of(b"x" * 100)]),
    # Hops.
    (
        "9110-7.6.2 Max-Forwards of TRACE counts this hop",
        message(b"TRACE / HTTP/1.1", b"Host: a", b"max-forwards: 10"),
        [message(b"TRACE / HTTP/1.1", b"Host: a", b"max-forwards: 9")],
    ),
    (
        "9110-7.6.2 Max-Forwards of OPTIONS counts this hop",
        message(b"OPTIONS * HTTP/1.1", b"Host: a", b"Max-Forwards: 1"),
        [message(b"OPTIONS * HTTP/1.1", b"Host: a", b"Max-Forwards: 0")],
    ),
    ("9110-7.6.2 Max-Forwards of others is not ours", get(b"Max-Forwards: 0"), None),
    # More than one.
    ("9112-9.3.2 pipelined", get() + SIZED + get(), [get(), SIZED, get()]),
    ("9112-9.3.2 pipelined behind chunks", HELLO + HELLO + get(), [SIZED, SIZED, get()]),
    ("9112-2.2 an empty line behind a body", SIZED + b"\r\n" + get(), [SIZED, get()]),
]  # fmt: skip

#: Name (RFC section first), what comes, why it is refused.
REFUSED: list[tuple[str, bytes, type[FramingError]]] = [
    # Request lines.
    ("9112-3 HTTP/0.9", b"GET /\r\n\r\n", BAD),
    ("9112-2.3 HTTP/2.0", message(b"GET / HTTP/2.0", b"Host: a"), VersionUnsupported),
    ("9112-2.3 HTTP/1.2", message(b"GET / HTTP/1.2", b"Host: a"), VersionUnsupported),
    ("9112-3 a blank for a version", b"GET / \r\n\r\n", BAD),
    ("9112-3 a method alone", b"GET\r\n\r\n", BAD),
    ("9112-3 half a version", b"GET / HTTP\r\n\r\n", BAD),
    ("9112-3 a version without its digits", b"GET / HTTP/1.\r\n\r\n", BAD),
    ("9113-3.4 the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", BAD),
    ("9112-2.3 a version in small letters", message(b"GET / http/1.1", b"Host: a"), BAD),
    ("9112-2.3 a version of two digits", message(b"GET / HTTP/1.10", b"Host: a"), BAD),
    ("9112-2.3 another protocol", message(b"GET / RTSP/1.0", b"Host: a"), BAD),
    ("9110-9.3.6 CONNECT", message(b"CONNECT a:443 HTTP/1.1", b"Host: a:443"), Unsupported),
    ("9112-3.2.3 authority-form without CONNECT", get(target=b"a:443"), BAD),
    ("9112-3.2.4 * without OPTIONS", get(target=b"*"), BAD),
    ("9112-3.2 a target without a slash", get(target=b"index.html"), BAD),
    ("9112-3.2.2 another scheme", get(target=b"ftp://b/"), BAD),
    ("9112-3.2.2 a scheme that begins like http", get(target=b"httpss://b/"), BAD),
    ("9112-3.2.2 no host", get(target=b"http:///x"), BAD),
    ("9110-4.2.4 a user in the target", get(target=b"http://u:p@b/"), BAD),
    ("9112-3.2.2 absolute-form without Host in 1.1", message(b"GET http://b/ HTTP/1.1"), BAD),
    ("9112-3.2.2 absolute-form with a fragment", get(target=b"http://b/#c"), BAD),
    ("3986-3.5 a fragment", get(target=b"/a#b"), BAD),
    ("3986-2 a target above ASCII", get(target=b"/\xc3\xa4"), BAD),
    ("3986-2 a control character in a target", get(target=b"/\x01"), BAD),
    ("3986-2 DEL in a target", get(target=b"/\x7f"), BAD),
    ("3986-2 NUL in a target", get(target=b"/\0"), BAD),
    ("9112-3 a blank in the target", get(target=b"/a b"), BAD),
    ("9112-3 two blanks behind the method", message(b"GET  / HTTP/1.1", b"Host: a"), BAD),
    ("9112-3 two blanks behind the target", message(b"GET /  HTTP/1.1", b"Host: a"), BAD),
    ("9112-3 a tab", message(b"GET\t/ HTTP/1.1", b"Host: a"), BAD),
    ("9112-3 a blank behind the version", message(b"GET / HTTP/1.1 ", b"Host: a"), BAD),
    ("9112-2.2 a blank before the method", message(b" GET / HTTP/1.1", b"Host: a"), BAD),
    ("9112-2.2 LF before the method", b"\n" + get(), BAD),
    ("9112-2.2 CR before the method", b"\r" + get(), BAD),
    ("9110-9.1 a method in small letters", message(b"get / HTTP/1.1", b"Host: a"), BAD),
    ("9110-9.1 a method that is no token", message(b"GE(T / HTTP/1.1", b"Host: a"), BAD),
    ("9112-3 nothing but a body", b"hello\r\n\r\n", BAD),
    ("9112-3 TLS", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n", BAD),
    # Lines and fields.
    ("9112-2.2 bare LF behind the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", BAD),
    ("9112-2.2 bare LF behind a field", b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", BAD),
    ("9112-2.2 bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n", BAD),
    ("9112-2.2 bare LF for the empty line", b"GET / HTTP/1.1\r\nHost: a\r\n\n", BAD),
    ("9112-2.2 bare CR in a value", get(b"X: a\rb"), BAD),
    ("9112-2.2 bare CR behind a value", b"GET / HTTP/1.1\r\nHost: a\r\r\n\r\n", BAD),
    ("9110-5.5 NUL in a value", get(b"X: a\0b"), BAD),
    ("9110-5.5 a control character in a value", get(b"X: a\x01"), BAD),
    ("9110-5.5 DEL in a value", get(b"X: a\x7f"), BAD),
    ("9112-5.2 obs-fold", get(b"X: a\r\n b"), BAD),
    ("9112-5.2 obs-fold with a tab", get(b"X: a\r\n\tb"), BAD),
    ("9112-5.2 obs-fold of Transfer-Encoding", post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"), BAD),
    ("9112-2.2 a blank before the first field", message(b"GET / HTTP/1.1", b" X: b", b"Host: a"), BAD),
    ("9112-5.1 a blank before the colon", get(b"X : b"), BAD),
    ("9112-5.1 a blank before the colon of a length", post(b"Content-Length : 5"), BAD),
    ("9112-5.1 a tab before the colon", get(b"X\t: b"), BAD),
    ("9110-5.1 no name", get(b": b"), BAD),
    ("9110-5.1 no colon", get(b"X"), BAD),
    ("9110-5.1 a name that is no token", get(b"X(: b"), BAD),
    ("9110-5.1 a name above ASCII", get(b"X\xff: b"), BAD),
    ("9110-5.1 NUL in a name", get(b"X\0: b"), BAD),
    # Host.
    ("9112-3.2 no Host", message(b"GET / HTTP/1.1"), BAD),
    ("9112-3.2 Host twice, equal", get(b"Host: a"), BAD),
    ("9112-3.2 Host twice, one in absolute-form", get(b"host: c", target=b"http://b/"), BAD),
    ("9112-3.2 a list of hosts", message(b"GET / HTTP/1.1", b"Host: a, b"), BAD),
    ("9112-3.2 a blank in Host", message(b"GET / HTTP/1.1", b"Host: a b"), BAD),
    ("9112-3.2 a user in Host", message(b"GET / HTTP/1.1", b"Host: u@a"), BAD),
    ("9112-3.2 a path in Host", message(b"GET / HTTP/1.1", b"Host: a/b"), BAD),
    ("9110-7.2 a port alone", message(b"GET / HTTP/1.1", b"Host: :80"), BAD),
    ("9110-7.2 a port that is none", message(b"GET / HTTP/1.1", b"Host: a:8x"), BAD),
    ("9110-7.2 a port of six digits", message(b"GET / HTTP/1.1", b"Host: a:800000"), BAD),
    ("3986-2.1 a percent sign alone", message(b"GET / HTTP/1.1", b"Host: a%zz"), BAD),
    ("9110-7.2 a bracket alone", message(b"GET / HTTP/1.1", b"Host: [::1"), BAD),
    ("9110-7.2 Host above ASCII", message(b"GET / HTTP/1.1", b"Host: \xc3\xa4"), BAD),
    # Content-Length.
    ("9112-6.3 a length twice, equal", post(b"Content-Length: 5", b"Content-Length: 5"), BAD),
    ("9112-6.3 two lengths", post(b"Content-Length: 5", b"content-length: 6"), BAD),
    ("9112-6.3 a list of lengths", post(b"Content-Length: 5, 5"), BAD),
    ("9110-8.6 a plus", post(b"Content-Length: +5"), BAD),
    ("9110-8.6 a minus", post(b"Content-Length: -5"), BAD),
    ("9110-8.6 minus zero", post(b"Content-Length: -0"), BAD),
    ("9110-8.6 no digits", post(b"Content-Length:"), BAD),
    ("9110-8.6 blanks for digits", post(b"Content-Length: \t "), BAD),
    ("9110-8.6 a blank between digits", post(b"Content-Length: 5 5"), BAD),
    ("9110-8.6 hex", post(b"Content-Length: 0x5"), BAD),
    ("9110-8.6 an underscore", post(b"Content-Length: 1_0"), BAD),
    ("9110-8.6 an exponent", post(b"Content-Length: 5e0"), BAD),
    ("9110-8.6 a fraction", post(b"Content-Length: 5.0"), BAD),
    ("9110-8.6 quotes", post(b'Content-Length: "5"'), BAD),
    ("9110-8.6 digits of another script", post(b"Content-Length: \xd9\xa5"), BAD),
    ("9110-8.6 a vertical tab", post(b"Content-Length: \x0b5"), BAD),
    ("9110-8.6 2**64 + 5", post(b"Content-Length: 18446744073709551621"), BAD),
    ("9110-8.6 zeros without end", post(b"Content-Length: " + b"0" * 50 + b"5"), BAD),
    ("9110-5.1 a length in the spelling of WSGI", post(b"Content_Length: 5"), BAD),
    ("9110-5.1 a coding in the spelling of WSGI", post(b"TRANSFER_ENCODING: chunked", body=b"0\r\n\r\n"), BAD),
    # Transfer-Encoding.
    ("9112-6.1 both", post(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), BAD),
    ("9112-6.1 both, the other way", post(b"Transfer-Encoding: chunked", b"Content-Length: 0", body=b"0\r\n\r\n"), BAD),
    ("9112-6.1 chunked in two fields", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), BAD),
    ("9112-6.1 chunked twice", post(b"Transfer-Encoding: chunked, chunked"), BAD),
    ("9112-6.3 xchunked", post(b"Transfer-Encoding: xchunked"), BAD),
    ("9112-6.3 a coding behind chunked", post(b"Transfer-Encoding: chunked, identity"), BAD),
    ("9112-6.3 identity", post(b"Transfer-Encoding: identity"), BAD),
    ("9112-6.3 gzip alone", post(b"Transfer-Encoding: gzip"), BAD),
    ("9112-6.3 codings in two fields", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity"), BAD),
    ("9112-6.3 no coding", post(b"Transfer-Encoding: "), BAD),
    ("9112-6.3 an empty member", post(b"Transfer-Encoding: ,chunked"), BAD),
    ("9112-6.3 a vertical tab", post(b"Transfer-Encoding: \x0bchunked"), BAD),
    ("9112-6.3 quotes", post(b'Transfer-Encoding: "chunked"'), BAD),
    ("9112-7 a parameter", post(b"Transfer-Encoding: chunked;a=b"), BAD),
    ("9112-6.1 in HTTP/1.0", message(b"POST / HTTP/1.0", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"), BAD),
    ("9112-6.1 gzip, chunked", post(b"Transfer-Encoding: gzip, chunked"), Unsupported),
    ("9112-6.1 an unknown coding, chunked", post(b"Transfer-Encoding: x-y,CHUNKED"), Unsupported),
    # Chunks.
    ("9112-7.1 a plus", chunked(b"+5\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 a minus", chunked(b"-1\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 0x", chunked(b"0x5\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 an underscore", chunked(b"0_5\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 no hex", chunked(b"g\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 no size", chunked(b"\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 an extension and no size", chunked(b";a\r\n\r\n"), BAD),
    ("9112-7.1 a blank before the size", chunked(b" 5\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 a blank behind the size", chunked(b"5 \r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 2**64 + 5", chunked(b"10000000000000005\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 bare LF behind the size", chunked(b"5\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 CR CR LF behind the size", chunked(b"5\r\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 no CRLF behind the data", chunked(b"5\r\nhello0\r\n\r\n"), BAD),
    ("9112-7.1 two other bytes behind the data", chunked(b"5\r\nhelloXY0\r\n\r\n"), BAD),
    ("9112-7.1 LF CR behind the data", chunked(b"5\r\nhello\n\r0\r\n\r\n"), BAD),
    ("9112-7.1 bare LF behind the data", chunked(b"5\r\nhello\n0\r\n\r\n"), BAD),
    ("9112-7.1 bare CR behind the data", chunked(b"5\r\nhello\r0\r\n\r\n"), BAD),
    ("9112-7.1 data longer than its size", chunked(b"4\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1 bare LF behind the last chunk", chunked(b"0\n\n"), BAD),
    ("9112-7.1.1 bare CR in an extension", chunked(b"5;a\rb\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1.1 bare LF in an extension", chunked(b"5;a\n0\r\n\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1.1 NUL in an extension", chunked(b"5;\0\r\nhello\r\n0\r\n\r\n"), BAD),
    ("9112-7.1.1 an extension above the limit", chunked(b"5;%b\r\nhello\r\n0\r\n\r\n" % (b"x" * 253)), BAD),
    ("9112-7.1.2 a trailer that is no field", chunked(b"0\r\nhello\r\n\r\n"), BAD),
    ("9112-7.1.2 a folded trailer", chunked(b"0\r\nA: b\r\n c\r\n\r\n"), BAD),
    ("9112-7.1.2 a blank before the colon of a trailer", chunked(b"0\r\nA : b\r\n\r\n"), BAD),
    ("9112-7.1.2 bare LF behind a trailer", chunked(b"0\r\nA: b\n\r\n"), BAD),
    ("9112-7.1.2 bare CR in a trailer", chunked(b"0\r\nA: b\rc\r\n\r\n"), BAD),
    ("9112-7.1.2 NUL in a trailer", chunked(b"0\r\nA: \0\r\n\r\n"), BAD),
    ("9112-7.1.2 a request for a trailer", chunked(b"0\r\n" + NEXT), BAD),
    # What is asked of a proxy.
    ("9110-7.6.2 TRACE that ends here", message(b"TRACE / HTTP/1.1", b"Host: a", b"Max-Forwards: 0"), Unsupported),
    ("9110-7.6.2 OPTIONS that ends here", message(b"OPTIONS / HTTP/1.1", b"Host: a", b"Max-Forwards: 0"), Unsupported),
    ("9110-7.6.2 Max-Forwards that is no number", message(b"TRACE / HTTP/1.1", b"Host: a", b"Max-Forwards: -1"), BAD),
    ("9110-10.1.1 another expectation", get(b"Expect: a-pony"), ExpectationFailed),
    ("9110-10.1.1 expectations in two fields", get(b"Expect: x", b"Expect: 100-continue"), ExpectationFailed),
    ("9110-10.1.1 a list of expectations", post(b"Expect: 100-continue, x", b"Content-Length: 5"), ExpectationFailed),
    # Sizes.
    ("9110-15.5.14 a body above the limit", post(b"Content-Length: 101"), MessageTooLarge),
    ("9110-15.5.14 a body far above the limit", post(b"Content-Length: 999999999999999999"), MessageTooLarge),
    ("9110-15.5.14 a chunk above the limit", chunked(b"65\r\n"), MessageTooLarge),
    ("9110-15.5.14 chunks above the limit", chunked(b"64\r\n%b\r\n1\r\n" % (b"x" * 100)), MessageTooLarge),
    ("9112-7.1 a chunk of 60 bits", chunked(b"fffffffffffffff\r\n"), MessageTooLarge),
    ("6585-5 101 fields", get(*[b"A: b"] * 100), HeadTooLarge),
]  # fmt: skip

FORBIDDEN_TRAILERS = [
    b"Content-Length: 5", b"content_length: 5", b"Transfer-Encoding: chunked", b"Host: b", b"Connection: close",
    b"TE: x", b"Trailer: x", b"Upgrade: x", b"Expect: 100-continue", b"Authorization: x", b"Cookie: x",
    b"Content-Type: x", b"Content-Encoding: x", b"Content-Range: x", b"Cache-Control: x", b"Keep-Alive: x",
    b"Proxy-Authorization: x", b"Max-Forwards: 0", b"Set-Cookie: x", b"If-Match: x", b"Range: bytes=0-1",
    b"X-Forwarded-For: x",
]  # fmt: skip


def request_line(size: int) -> bytes:
    """A request whose first line has `size` bytes."""
    return get(target=b"/" + b"a" * (size - len(b"GET / HTTP/1.1")))


#: Name, the limits, what comes, what becomes of it; of each limit, at it and one above.
LIMITED: list[tuple[str, Limits, bytes, type[FramingError] | None]] = [
    ("6585-5 a head at the limit", SMALL_HEADS, sized(256), None),
    ("6585-5 a head above the limit", SMALL_HEADS, sized(257), HeadTooLarge),
    ("6585-5 a head above the limit without an end", SMALL_HEADS, sized(258)[:-1], HeadTooLarge),
    ("9112-3 a request line at the limit", LIMITS, request_line(8192), None),
    ("9112-3 a request line above the limit", LIMITS, request_line(8193), TargetNameTooLong),
    ("9112-3 a request line above the limit of heads", SMALL_HEADS, request_line(300), TargetNameTooLong),
    ("9112-3 a request line without an end", SMALL_HEADS, request_line(300)[:257], TargetNameTooLong),
    ("9112-7.1.2 trailers at the limit", SMALL_HEADS, chunked(b"0\r\n%b\r\n\r\n" % (b"A: b\r\n" * 42)[:-2]), None),
    ("9112-7.1.2 trailers above the limit", SMALL_HEADS, chunked(b"0\r\n%b\r\n" % (b"A: b\r\n" * 43)), HeadTooLarge),
    ("9112-7.1.2 a trailer at the limit", SMALL_HEADS, chunked(b"0\r\nA: %b\r\n\r\n" % (b"b" * 249)), None),
    ("9112-7.1.2 a trailer above the limit", SMALL_HEADS, chunked(b"0\r\nA:%b\r\n\r\n" % (b"b" * 251)), HeadTooLarge),
]  # fmt: skip

STATUSES = {
    FramingError: b"400 Bad Request",
    RequestTimeout: b"408 Request Timeout",
    MessageTooLarge: b"413 Content Too Large",
    TargetNameTooLong: b"414 URI Too Long",
    ExpectationFailed: b"417 Expectation Failed",
    HeadTooLarge: b"431 Request Header Fields Too Large",
    Unsupported: b"501 Not Implemented",
    ConnectError: b"502 Bad Gateway",
    ConnectTimeout: b"502 Bad Gateway",
    UpstreamClosed: b"502 Bad Gateway",
    BadAnswer: b"502 Bad Gateway",
    Overloaded: b"503 Service Unavailable",
    QueueTimeout: b"503 Service Unavailable",
    AnswerTimeout: b"504 Gateway Timeout",
    VersionUnsupported: b"505 HTTP Version Not Supported",
}


def random_cuts(data: bytes, name: str) -> list[bytes]:
    """`data` in a few random pieces, most of them short."""
    dice = random.Random(f"{SEED} {name}")
    marks = sorted({0, len(data), *(dice.randrange(len(data) + 1) for _ in range(dice.randrange(1, 9)))})
    return [data[start:end] for start, end in pairwise(marks)]


def feedings(data: bytes, name: str) -> list[list[bytes]]:
    """`data` whole, byte by byte and in random cuts."""
    print(f"GMUX_TEST_SEED={SEED}")
    return [*in_one(data), *by_byte(data), *(random_cuts(data, f"{name} {n}") for n in range(CUTS))]


def without_end(sent: bytes) -> bytes:
    """`sent` without what gmux puts at the end of each head, so that the tables show the rest."""
    head, end, body = sent.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[-1] == (b"Connection: keep-alive, TE" if lines[-2] == b"TE: trailers" else b"Connection: keep-alive")
    return b"\r\n".join(lines[:-1]) + end + body


def run(pieces: list[bytes], limits: Limits = LIMITS) -> tuple[list[bytes], FramingError | None]:
    """The requests that go on whole, and why the decoder gave up; asks after each piece, as gmux does."""
    decoder = HttpCodec(limits, via=False).request_decoder()
    sent: list[bytes] = []
    request, body = Request(b""), b""
    try:
        for piece in pieces:
            decoder.receive_data(piece)
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Request):
                    request, body = event, b""
                else:
                    body += event.data
                if event.whole if isinstance(event, Request) else event.last:
                    # The codec may complete the head with the last part.
                    sent.append(without_end(request.data + body))
    except FramingError as error:
        return sent, error
    return sent, None


def decode(raw: bytes) -> Request:
    decoder = HttpCodec(LIMITS, via=False).request_decoder()
    decoder.receive_data(raw)
    request = decoder.next_event()
    assert isinstance(request, Request)
    return request


def by_name(table):
    return pytest.mark.parametrize("case", table, ids=[row[0].replace(" ", "-") for row in table])


def test_tables_of_requests_names_are_distinct():
    """A name makes the random cuts of its case, and is how a failure is found."""
    for table in (ACCEPTED, REFUSED, LIMITED):
        names = [row[0] for row in table]
        assert sorted(set(names)) == sorted(names)


@by_name(ACCEPTED)
def test_request_valid_goes_on_byte_for_byte(case):
    name, raw, sent = case
    for pieces in feedings(raw, name):
        found, error = run(pieces)
        assert (found, error) == (sent or [raw], None), pieces
        # And it is as many requests to a reader that forgives nothing.
        assert len(strict_http.requests(b"".join(found))) == len(found), pieces


@by_name(ACCEPTED)
def test_request_valid_with_another_behind_it_stays_apart(case):
    name, raw, sent = case
    for pieces in feedings(raw + NEXT, name):
        assert run(pieces) == ([*(sent or [raw]), NEXT], None), pieces


@by_name(ACCEPTED)
def test_request_cut_off_is_not_whole(case):
    """One byte is missing: of the last request nothing may go on as if it were whole."""
    _, raw, sent = case
    for pieces in (*in_one(raw[:-1]), *by_byte(raw[:-1])):
        assert run(pieces) == ((sent or [raw])[:-1], None)


@by_name(REFUSED)
def test_request_doubtful_is_refused(case):
    name, raw, error = case
    for pieces in feedings(raw, name):
        sent, raised = run(pieces)
        assert (sent, type(raised)) == ([], error), pieces


@by_name(REFUSED)
def test_request_doubtful_behind_a_valid_one_is_refused_alone(case):
    name, raw, error = case
    for pieces in feedings(NEXT + raw + NEXT, name):
        sent, raised = run(pieces)
        assert (sent, type(raised)) == ([NEXT], error), pieces


@pytest.mark.parametrize("trailer", FORBIDDEN_TRAILERS)
def test_trailer_that_changes_the_message_is_refused(trailer):
    """RFC 9110 section 6.5.1."""
    for line in (trailer, trailer.lower(), trailer.upper()):
        for pieces in feedings(chunked(b"1\r\nx\r\n0\r\nA: b\r\n%b\r\n\r\n" % line), trailer.decode()):
            sent, raised = run(pieces)
            assert (sent, type(raised)) == ([], FramingError)


@by_name(LIMITED)
def test_request_at_a_limit_passes_and_above_is_refused(case):
    name, limits, raw, error = case
    for pieces in feedings(raw, name):
        sent, raised = run(pieces, limits)
        assert (sent, type(raised) if raised else None) == ([] if error else [raw], error)


@pytest.mark.parametrize("error", STATUSES)
def test_refusal_of_an_error_has_its_status_and_a_length(error):
    refusal = HttpCodec(LIMITS).refuse(error("why"), None)
    head, _, body = refusal.data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + STATUSES[error] + b"\r\n")
    assert b"\r\nContent-Length: %d\r\n" % len(body) in head
    assert b"why" in body
    assert (b"\r\nRetry-After: " in head) == STATUSES[error].startswith(b"503")
    # The rest of a request that was refused may still come: it must not be read as the next one.
    assert refusal.close
    assert head.endswith(b"\r\nConnection: close")


def test_refusal_of_a_whole_request_leaves_the_connection_open():
    refuse = HttpCodec(LIMITS).refuse
    kept = refuse(QueueTimeout("why"), decode(get()))
    assert not kept.close
    assert b"\r\nConnection:" not in kept.data
    closed = refuse(QueueTimeout("why"), decode(get(b"Connection: close")))
    assert closed.close
    assert b"\r\nConnection: close\r\n\r\n" in closed.data
    old = refuse(QueueTimeout("why"), decode(message(b"GET / HTTP/1.0", b"Connection: keep-alive")))
    assert not old.close
    assert b"\r\nConnection: keep-alive\r\n\r\n" in old.data


def test_refusal_of_a_head_request_has_no_body():
    """RFC 9110 section 9.3.2: a body would be taken for the next answer."""
    data = HttpCodec(LIMITS).refuse(QueueTimeout("why"), decode(message(b"HEAD / HTTP/1.1", b"Host: a"))).data
    assert data.endswith(b"\r\n\r\n")
    assert data.count(b"\r\n\r\n") == 1


def test_refusal_table_has_every_error_that_a_client_can_meet():
    met = {Overloaded, QueueTimeout, RequestTimeout, AnswerTimeout, UpstreamClosed, BadAnswer}
    assert set(STATUSES) == met | {FramingError, ConnectError} | {
        *FramingError.__subclasses__(),
        *ConnectError.__subclasses__(),
    }


@pytest.mark.parametrize(
    ("fields", "version", "closes"),
    [
        ([], b"1.1", False),
        ([b"Connection: close"], b"1.1", True),
        ([b"Connection: Close"], b"1.1", True),
        ([b"Connection: keep-alive, close"], b"1.1", True),
        ([b"Connection: keep-alive", b"Connection: x,\tclose"], b"1.1", True),
        ([b"Connection: closed"], b"1.1", False),
        ([b"Proxy-Connection: close"], b"1.1", False),
        ([], b"1.0", True),
        ([b"Connection: keep-alive"], b"1.0", False),
        ([b"Connection: Keep-Alive"], b"1.0", False),
        ([b"Connection: keep-alive, close"], b"1.0", True),
        ([b"Keep-Alive: 5"], b"1.0", True),
    ],
)
def test_request_says_whether_its_client_closes(fields, version, closes):
    """RFC 9112 section 9.3."""
    assert decode(message(b"GET / HTTP/" + version, b"Host: a", *fields)).close is closes


@pytest.mark.parametrize(
    ("method", "is_repeatable"),
    [
        *((method, True) for method in (b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE")),
        *((method, False) for method in (b"POST", b"PATCH", b"PROPFIND", b"GETX", b"M-SEARCH")),
    ],
)
def test_request_may_be_repeated_only_with_an_idempotent_method(method, is_repeatable):
    """RFC 9110 section 9.2.2."""
    assert decode(message(method + b" / HTTP/1.1", b"Host: a")).repeatable is is_repeatable


@pytest.mark.parametrize("fields", [[b"Content-Length: 5"], [b"Transfer-Encoding: chunked"]])
def test_expect_before_a_body_is_answered_once(fields):
    """RFC 9110 section 10.1.1; the target hears of the request only when its body is here."""
    raw = post(b"Expect: 100-Continue", *fields, body=b"")
    decoder = HttpCodec(LIMITS, via=False).request_decoder()
    for at in range(len(raw)):
        assert decoder.take_owed() == b""
        decoder.receive_data(raw[at : at + 1])
        decoder.next_event()
    assert decoder.take_owed() == CONTINUE
    assert decoder.take_owed() == b""
    body = b"hello" if b"Length" in fields[0] else b"0\r\n\r\n"
    decoder.receive_data(body)
    part = decoder.next_event()
    assert isinstance(part, Part) and part.last
    assert decoder.take_owed() == b""


@pytest.mark.parametrize(
    "raw",
    [
        post(b"Content-Length: 5", body=b""),
        post(b"Content-Length: 5", b"Expect: 100-continue", body=b"h"),
        post(b"Content-Length: 5", b"Expect: 100-continue"),
        post(b"Content-Length: 0", b"Expect: 100-continue", body=b""),
        get(b"Expect: 100-continue"),
        message(b"POST / HTTP/1.0", b"Content-Length: 5", b"Expect: 100-continue"),
    ],
    ids=["no Expect", "body begun", "body there", "no body", "no length", "HTTP/1.0"],
)
def test_expect_where_nobody_waits_is_not_answered(raw):
    """RFC 9110 section 10.1.1."""
    decoder = HttpCodec(LIMITS, via=False).request_decoder()
    decoder.receive_data(raw)
    while decoder.next_event() is not None:
        pass
    assert decoder.take_owed() == b""


def test_expect_of_a_body_too_large_is_refused_at_once():
    decoder = HttpCodec(LIMITS, via=False).request_decoder()
    decoder.receive_data(post(b"Expect: 100-continue", b"Content-Length: 101", body=b""))
    request = decoder.next_event()
    with pytest.raises(MessageTooLarge):
        decoder.next_event()
    assert isinstance(request, Request), "the refusal is worded for the request"
    assert decoder.take_owed() == b""


def test_expect_of_one_request_is_not_owed_to_the_next():
    decoder = HttpCodec(LIMITS, via=False).request_decoder()
    decoder.receive_data(post(b"Expect: 100-continue", b"Content-Length: 5", body=b""))
    decoder.next_event()
    decoder.receive_data(b"hello" + post(b"Content-Length: 5", body=b""))
    while decoder.next_event() is not None:
        pass
    assert decoder.take_owed() == b""
