"""The requests of one client, and what they become on their way to the target."""

from __future__ import annotations

from gmux.codecs import _http_head
from gmux.codecs._buffer import Buffer
from gmux.codecs._http_body import Body, ChunkedBody, LengthBody
from gmux.codecs._http_rewriting import Rewriting
from gmux.codecs.base import Limits, Part, Request
from gmux.errors import ExpectationFailed, FramingError, Unsupported

#: A body up to this size goes on in one piece with its head; a larger one in parts.
MAX_WHOLE = 64 * 1024

CR, SLASH = b"\r/"

MAX_EMPTY_LINES = 16

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

#: RFC 9110 section 9.2.2.
IDEMPOTENT = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"PUT", b"DELETE"))

#: RFC 9110 section 9.2.1; only these may be in flight with others (RFC 9112 section 9.3.2).
SAFE = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE"))

#: Methods whose requests have no body with a meaning (RFC 9110 section 9.3). A target that does not read one takes it
#: for the next request, and its answer would go to another client: the connection of such a request ends with it.
BODYLESS = frozenset((b"GET", b"HEAD", b"OPTIONS", b"TRACE", b"DELETE"))

#: What a request begins with whose answer has no content (RFC 9110 section 9.3.2).
HEAD = b"HEAD "

#: Methods that a proxy must look at.
PROXIED = frozenset((b"CONNECT", b"OPTIONS", b"TRACE"))


class HttpRequest(Request):
    """With what the framing of its answer depends on, and what becomes of the upstream connection.

    has_doubtful_body  the target may take the body for another request
    binds              it may authenticate the connection, which is the client's own from then on
    is_usual           the answer is framed as most are, and both of these are false
    """

    __slots__ = ("binds", "has_doubtful_body", "is_usual", "method", "minor_version")

    def __init__(self, data: bytes, method: bytes, minor_version: int, close: bool, binds: bool = False) -> None:
        # Without a call of the base's: each request pays for it.
        self.data = data
        self.whole = True
        self.close = close
        # Credentials for one connection are good for no other, nor beside the requests of others.
        self.repeatable = not binds and method in IDEMPOTENT
        self.pipelines = not binds and method in SAFE
        self.method = method
        self.minor_version = minor_version
        self.binds = binds
        self.has_doubtful_body = False
        self.is_usual = bool(minor_version) and not binds and method != b"HEAD"

    def doubt_body(self) -> None:
        self.has_doubtful_body = True
        self.is_usual = False


class HttpRequestDecoder(Buffer):
    """Requests of one client. Between requests `_body` is None.

    A chunked body goes on with a Content-Length: it is here whole before the request goes on, and a target that does
    not know chunks would take them for requests. So the head of such a request, `_chunked`, is completed at its end.
    """

    __slots__ = ("_limits", "_rewriting", "_client", "_body", "_chunked", "_end", "_empty_lines")

    def __init__(self, limits: Limits, rewriting: Rewriting, client: str) -> None:
        super().__init__()
        self._limits = limits
        self._rewriting = rewriting
        self._client = client
        self._body: Body | None = None
        self._chunked: HttpRequest | None = None
        self._end = b""
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
        try:
            return self._begin(head)
        except FramingError:
            self.put_back(head)
            raise

    @property
    def begun(self) -> HttpRequest | None:
        # RFC 9110 section 9.3.2: nothing but the method says that an answer has no content, also one to a bad request.
        if self._body is not None or not self.peek(2 * MAX_EMPTY_LINES + len(HEAD)).lstrip(b"\r\n").startswith(HEAD):
            return None
        return HttpRequest(b"", HEAD.rstrip(), 1, close=True)

    def _next_part(self, body: Body) -> Part | None:
        part = body.read(self)
        if part is not None and part.last:
            self._body = None
            self.owed = b""
            if isinstance(body, ChunkedBody):
                self._complete(body, part)
        return part

    def _complete(self, body: ChunkedBody, part: Part) -> None:
        """State the length of a chunked body that is here whole, in the head that waits for it."""
        request = self._chunked
        assert request is not None
        self._chunked = None
        size = body.size
        if request.method in BODYLESS and size:
            request.doubt_body()
        trailers = self._rewriting.drop_from_trailers(body.trailers)
        if not trailers:
            request.data += b"Content-Length: %d\r\n" % size + self._end
            return
        # Only chunks can have trailers. Whether the target knows them is in doubt.
        request.doubt_body()
        request.data += b"Transfer-Encoding: chunked\r\n" + self._end + (b"%x\r\n" % size if size else b"")
        part.data += (b"\r\n" if size else b"") + b"0\r\n" + trailers + b"\r\n"

    def _begin(self, head: bytes) -> HttpRequest:
        parsed = _http_head.parse_request(head)
        method, path, minor_version = parsed.method, parsed.path, parsed.minor_version
        rewriting = self._rewriting
        absolute = None
        # The parser has refused blanks and control characters; what else no URL has, targets read in different ways.
        if path[0] != SLASH or b"#" in path or not path.isascii():
            if method == b"CONNECT":
                raise Unsupported("CONNECT is not offered")
            absolute = _http_head.split_absolute(method, path)
            if absolute is not None:
                path = absolute[1]
        lines = [method + b" " + path + b" HTTP/1.1"]
        framing = _http_head.read_fields(parsed.headers, lines)
        host = framing.host
        if host is None:
            if minor_version:
                raise FramingError("Host is missing")
            host = rewriting.authority
            lines.insert(1, b"Host: " + host if host else b"Host:")
        if method in PROXIED:
            self._check_method(method, lines)
        if absolute is not None:
            # RFC 9112 section 3.2.2: the authority in the target stands, whatever Host says.
            host = absolute[0]
        if absolute is not None or rewriting.changes:
            lines = rewriting.drop_replaced(_http_head.drop(lines, (b"host",)))
            lines.insert(1, b"Host: " + (rewriting.host or host))
        if framing.is_chunked and not minor_version:
            raise FramingError("Transfer-Encoding in HTTP/1.0")
        lines.append(_http_head.END_LINES)
        data = b"\r\n".join(lines)
        if data != head:
            _http_head.check_lines(head)
        options = framing.options
        closes = b"close" in options if minor_version else b"keep-alive" not in options or b"close" in options
        end = rewriting.usual_end
        if not minor_version or framing.takes_trailers:
            end = rewriting.end(minor_version, framing.takes_trailers)
        if rewriting.forwards:
            end = rewriting.forwarded_lines(self._client, host) + b"\r\n" + end
        binds = bool(framing.schemes) and _http_head.have_credentials(lines)
        request = HttpRequest(data[:-2] + end, method, minor_version, closes, binds)
        if framing.expectation is not None and minor_version and framing.expectation != b"100-continue":
            raise ExpectationFailed("no expectation but 100-continue is met")
        if framing.length:
            if method in BODYLESS:
                request.doubt_body()
            self._begin_body(request, framing)
        elif framing.is_chunked:
            request.data = b"\r\n".join(_http_head.drop(lines[:-1], (b"transfer-encoding",))) + b"\r\n"
            self._chunked, self._end = request, end
            self._begin_body(request, framing)
        return request

    def _check_method(self, method: bytes, lines: list[bytes]) -> None:
        """Refuse what this proxy does not offer, and count the hop in `lines`. Raises FramingError, Unsupported."""
        if method == b"CONNECT":
            raise Unsupported("CONNECT is not offered")
        if method == b"TRACE" and self._rewriting.sets_fields:
            raise Unsupported("TRACE is not offered: its answer would show the fields of --set-header")
        if not _http_head.count_hop(lines):
            raise Unsupported(f"{method.decode()} ends here (Max-Forwards), where it is not offered")

    def _begin_body(self, request: HttpRequest, framing: _http_head.Framing) -> None:
        request.pipelines = False
        limit = self._limits.max_message
        length = framing.length
        if length is None:
            self._body = ChunkedBody(False, limit, self._limits.max_head)
        elif length <= MAX_WHOLE and len(self) >= length and length <= limit:
            request.data += self.take(length)
            return
        else:
            self._body = LengthBody(length, limit)
        request.whole = False
        # RFC 9110 section 10.1.1: HTTP/1.0 has no such expectation.
        expects = framing.expectation is not None and request.minor_version == 1
        if expects and not len(self) and (length is None or length <= limit):
            self.owed = CONTINUE
