"""HTTP/1.1 and 1.0 (RFC 9112): requests of many clients, one after another, on connections that stay open.

No https, no websocket, no CONNECT. A request's body is taken whole before the request goes on; an answer goes on as
it comes. What is sent to either side is written by gmux from the parsed head, never copied, and its body length is
stated exactly once.
"""

from __future__ import annotations

from typing import cast

from gmux.codecs import _http_head
from gmux.codecs._buffer import Buffer
from gmux.codecs._http_body import Body, ChunkedBody, EndBody, LengthBody
from gmux.codecs._http_head import AnswerHead
from gmux.codecs.base import Limits, Part, Refusal, Request
from gmux.errors import (
    AnswerTimeout,
    BadAnswer,
    ConnectError,
    ExchangeError,
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

#: A body up to this size goes on in one piece with its head; a larger one in parts.
MAX_WHOLE = 64 * 1024

CR, SLASH = b"\r/"

MAX_EMPTY_LINES = 16

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

#: RFC 9110 section 9.2.2.
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

#: Methods whose requests have no body with a meaning (RFC 9110 section 9.3). A target that does not read one takes it
#: for the next request, and its answer would go to another client: the connection of such a request ends with it.
BODYLESS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"DELETE"))

#: Seconds after which a client that was turned away may try again.
RETRY_AFTER = 1

STATUS: dict[type[ExchangeError], bytes] = {
    FramingError: b"400 Bad Request",
    RequestTimeout: b"408 Request Timeout",
    MessageTooLarge: b"413 Content Too Large",
    TargetNameTooLong: b"414 URI Too Long",
    HeadTooLarge: b"431 Request Header Fields Too Large",
    Unsupported: b"501 Not Implemented",
    ConnectError: b"502 Bad Gateway",
    UpstreamClosed: b"502 Bad Gateway",
    BadAnswer: b"502 Bad Gateway",
    Overloaded: b"503 Service Unavailable",
    QueueTimeout: b"503 Service Unavailable",
    AnswerTimeout: b"504 Gateway Timeout",
    VersionUnsupported: b"505 HTTP Version Not Supported",
}


class HttpRequest(Request):
    """With what the framing of its answer depends on."""

    __slots__ = ("has_doubtful_body", "method", "minor_version")

    method: bytes
    minor_version: int
    has_doubtful_body: bool


class HttpCodec:
    name = "http"
    summary = "HTTP/1.1 and 1.0, no https, no websocket"

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def request_decoder(self) -> HttpRequestDecoder:
        return HttpRequestDecoder(self._limits)

    def answer_decoder(self) -> HttpAnswerDecoder:
        return HttpAnswerDecoder(self._limits)

    def refuse(self, error: ExchangeError, request: Request | None) -> Refusal:
        status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
        request = cast("HttpRequest | None", request)
        # A request that was not read to its end leaves its rest on the connection, so the connection ends.
        close = request is None or request.close
        text = f"gmux: {error}\n".encode()
        lines = [
            b"HTTP/1.1 " + status,
            b"Server: gmux",
            b"Content-Type: text/plain; charset=utf-8",
            b"Content-Length: %d" % len(text),
        ]
        if status.startswith(b"503"):
            lines.append(b"Retry-After: %d" % RETRY_AFTER)
        if close:
            lines.append(b"Connection: close")
        elif request is not None and not request.minor_version:
            lines.append(b"Connection: keep-alive")
        if request is not None and request.method == b"HEAD":
            text = b""
        return Refusal(b"\r\n".join(lines) + b"\r\n\r\n" + text, close)

    def redact(self, message: bytes) -> bytes:
        return message


class HttpRequestDecoder(Buffer):
    """Requests of one client. Between requests `_body` is None."""

    __slots__ = ("_limits", "_body", "_owes_continue", "_empty_lines")

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits
        self._body: Body | None = None
        self._owes_continue = False
        self._empty_lines = 0

    def next_event(self) -> Request | Part | None:
        if self._body is not None:
            return self._next_part(self._body)
        if not self.data:
            return None
        if self.data[self._start] == CR:
            # RFC 9112 section 2.2: empty lines before a request line are to be ignored; but nobody sends many.
            while self.peek(2) == b"\r\n":
                self.take(2)
                self._empty_lines += 1
                if self._empty_lines > MAX_EMPTY_LINES:
                    raise FramingError(f"more than {MAX_EMPTY_LINES} empty lines came before a request")
        head = _http_head.take(self, self._limits.max_head)
        if head is None:
            _http_head.check_beginning(self.peek(_http_head.MAX_REQUEST_LINE))
            return None
        self._empty_lines = 0
        return self._begin(head)

    def take_reply(self) -> bytes:
        if self._owes_continue:
            self._owes_continue = False
            return CONTINUE
        return b""

    def _next_part(self, body: Body) -> Part | None:
        part = body.read(self)
        if part is not None and part.last:
            self._body = None
            self._owes_continue = False
        return part

    def _begin(self, head: bytes) -> HttpRequest:
        parsed = _http_head.parse_request(head)
        method, path, minor_version = parsed.method, parsed.path, parsed.minor_version
        if method == b"CONNECT":
            raise Unsupported("CONNECT is not offered")
        absolute = None
        # The parser has refused blanks and control characters; what else no URL has, targets read in different ways.
        if path[0] != SLASH or b"#" in path or not path.isascii():
            absolute = _http_head.split_absolute(method, path)
            if absolute is not None:
                path = absolute[1]
        lines = [method + b" " + path + b" HTTP/1.1"]
        framing = _http_head.read_fields(parsed.headers, lines)
        if framing.host is None:
            if minor_version:
                raise FramingError("Host is missing")
            lines.insert(1, b"Host:")
        if absolute is not None:
            # RFC 9112 section 3.2.2: the authority in the target stands, whatever Host says.
            lines = _http_head.drop(lines, (b"host",))
            lines.insert(1, b"Host: " + absolute[0])
        if framing.is_chunked and not minor_version:
            raise FramingError("Transfer-Encoding in HTTP/1.0")
        lines.append(_http_head.END_LINES)
        data = b"\r\n".join(lines)
        if data != head:
            _http_head.check_lines(head)
        options = framing.options
        closes = b"close" in options if minor_version else b"keep-alive" not in options or b"close" in options
        request = HttpRequest(data, True, method in IDEMPOTENT, closes)
        request.method = method
        request.minor_version = minor_version
        has_body = framing.is_chunked or bool(framing.length)
        request.has_doubtful_body = has_body and method in BODYLESS
        if has_body:
            self._begin_body(request, framing)
        return request

    def _begin_body(self, request: HttpRequest, framing: _http_head.Framing) -> None:
        limit = self._limits.max_message
        length = framing.length
        if length is None:
            self._body = ChunkedBody(True, limit, self._limits.max_head)
        elif length > limit:
            raise MessageTooLarge(f"a body of {length} bytes is longer than {limit} (--max-message)")
        elif length <= MAX_WHOLE and len(self) >= length:
            request.data += self.take(length)
            return
        else:
            self._body = LengthBody(length)
        # RFC 9110 section 10.1.1: HTTP/1.0 has no such expectation.
        self._owes_continue = framing.expects_continue and request.minor_version == 1 and not len(self)
        request.whole = False


class HttpAnswerDecoder(Buffer):
    """Answers on one upstream connection. `request` is None when none is due, `_body` while a head is awaited."""

    __slots__ = ("_limits", "_body", "_close", "_reusable", "_has_ended", "request")

    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._limits = limits
        self.request: Request | None = None
        self._body: Body | None = None
        self._close = self._reusable = self._has_ended = False

    def receive_eof(self) -> None:
        if self._body is None or self._body.end() is None:
            raise BadAnswer(
                "the target closed the connection in the middle of its answer"
                if self._body is not None or len(self)
                else "the target closed the connection without an answer"
            )
        self._has_ended = True

    def next_event(self) -> Part | None:
        try:
            if self._body is None:
                return self._next_head()
            part = self._body.read(self)
        except FramingError as error:
            raise BadAnswer(f"the target's answer is not valid HTTP: {error}") from None
        if part is None and self._has_ended:
            part = self._body.end()
        return self._finish(part) if part is not None and part.last else part

    @property
    def has_surplus(self) -> bool:
        return bool(self.data)

    def _finish(self, part: Part) -> Part:
        self._body = self.request = None
        part.close = self._close
        part.reusable = self._reusable
        return part

    def _next_head(self) -> Part | None:
        request = cast(HttpRequest, self.request)
        held = self.data
        if type(held) is bytes and not self._start and request.minor_version and request.method != b"HEAD":
            # Most answers come whole in one read. While one is taken the next request waits, so this way is short.
            end = held.find(_http_head.END) + len(_http_head.END)
            if len(_http_head.END) <= end <= _http_head.MAX_REMEMBERED:
                head = _http_head.remembered_answer(held[:end])
                is_plain = not request.close and not request.has_doubtful_body
                if is_plain and len(held) == end + head.plain_length:
                    self.data, self.request = b"", None
                    return Part(head.plain + held[end:])
        while True:
            data = _http_head.take(self, self._limits.max_head)
            if data is None:
                return None
            head = _http_head.parse_answer(data)
            if head.status >= 200:
                return self._begin(request, head)
            if head.status == 101:
                raise BadAnswer("the target switched protocols, which nobody asked for")
            if head.framing.length or head.framing.is_chunked:
                raise BadAnswer("an interim answer has a body")
            # 100 was answered by gmux already; HTTP/1.0 has no interim answers (RFC 9110 section 15.2).
            if head.status != 100 and request.minor_version:
                return Part(_http_head.without(head.lines, b"content-length") + _http_head.END, last=False)

    def _begin(self, request: HttpRequest, head: AnswerHead) -> Part:
        framing = head.framing
        lines = head.lines
        options = framing.options
        self._reusable = b"close" not in options and (head.minor_version == 1 or b"keep-alive" in options)
        self._reusable = self._reusable and not request.has_doubtful_body
        self._close = request.close
        length = 0
        if framing.is_chunked and not request.minor_version:
            lines = _http_head.without(lines, b"transfer-encoding")
        # RFC 9112 section 6.3, in its order.
        if request.method == b"HEAD" or head.status == 304:
            pass
        elif head.status == 204:
            # It has neither field (RFC 9110 section 8.6, RFC 9112 section 6.1). Where they speak of a body, the target
            # may send it after all, late enough to be taken for the next answer.
            lines = _http_head.without(lines, b"content-length", b"transfer-encoding")
            self._reusable = self._reusable and not framing.length and not framing.is_chunked
        elif framing.is_chunked:
            self._body = ChunkedBody(request.minor_version == 1, None, self._limits.max_head)
            self._close = self._close or not request.minor_version
        elif framing.length is None:
            self._reusable = False
            self._body = EndBody(request.minor_version == 1)
            if request.minor_version:
                lines += b"\r\nTransfer-Encoding: chunked"
            else:
                self._close = True
        elif framing.length > len(self):
            self._body = LengthBody(framing.length)
        else:
            length = framing.length
        if self._close:
            lines += b"\r\nConnection: close"
        elif not request.minor_version:
            lines += b"\r\nConnection: keep-alive"
        out = lines + _http_head.END
        if self._body is None:
            return self._finish(Part(out + self.take(length) if length else out))
        # What came with the head goes out with it: a short answer is one write.
        part = self._body.read(self)
        if part is None:
            return Part(out, last=False)
        part.data = out + part.data
        return self._finish(part) if part.last else part
