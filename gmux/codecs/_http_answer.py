"""The answers on one upstream connection, framed by the requests that they answer and written anew for the client."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from gmux.codecs import _http_authentication, _http_head
from gmux.codecs._buffer import Buffer
from gmux.codecs._http_body import Body, ChunkedBody, EndBody, LengthBody
from gmux.codecs._http_head import AnswerHead
from gmux.codecs._http_request import HttpRequest
from gmux.codecs.base import NO_LIMIT, Interim, Limits, Part, PrivatePart, Request
from gmux.errors import BadAnswer, FramingError

#: Interim answers before an answer; each of them is a sign of life, so without a limit a request would never end.
MAX_INTERIMS = 32


class HttpAnswerDecoder(Buffer):
    """Answers on one upstream connection. `request` is None when none is due, `_body` while a head is awaited.

    `parse` reads a head, and `recall` does it for a short one, whose meaning it may remember. `_requests_left` is what
    the target has said that it takes on this connection; None: nothing. `_is_private`: the connection is the asker's
    own; `_is_usual`: neither of these is so.
    """

    __slots__ = (
        "_limits",
        "_parse",
        "_recall",
        "_body",
        "_close",
        "_reusable",
        "_idle_limit",
        "_requests_left",
        "_is_private",
        "_is_usual",
        "_interims",
        "_has_ended",
        "may_pipeline",
        "request",
    )

    def __init__(
        self, limits: Limits, parse: Callable[[bytes], AnswerHead], recall: Callable[[bytes], AnswerHead]
    ) -> None:
        super().__init__()
        self._limits = limits
        self._parse = parse
        self._recall = recall
        self.request: Request | None = None
        self._body: Body | None = None
        self._close = self._reusable = self._has_ended = False
        self._idle_limit = NO_LIMIT
        self._requests_left: int | None = None
        self._is_private = False
        self._is_usual = True
        self._interims = 0
        self.may_pipeline = False

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

    @property
    def is_replaceable(self) -> bool:
        return not self.data and self._requests_left is None

    def _finish(self, part: Part) -> Part:
        self._body = self.request = None
        if self._is_private and self._reusable:
            return PrivatePart(part.data, self._close, self._idle_limit)
        part.close = self._close
        part.reusable = self._reusable
        part.idle_limit = self._idle_limit
        return part

    def _next_head(self) -> Part | None:
        request = cast(HttpRequest, self.request)
        held = self.data
        if request.is_usual and self._is_usual and type(held) is bytes and not self._start:
            # Most answers come whole in one read. While one is taken the next request waits, so this way is short.
            end = held.find(_http_head.END) + len(_http_head.END)
            if len(_http_head.END) <= end <= _http_head.MAX_REMEMBERED:
                head = self._recall(held[:end])
                if not request.close and len(held) == end + head.plain_length:
                    self.data, self.request = b"", None
                    self.may_pipeline = head.may_pipeline
                    return Part(head.plain + held[end:], True, False, True, head.idle_limit)
        data = _http_head.take(self, self._limits.max_head)
        if data is None:
            return None
        head = (self._recall if len(data) <= _http_head.MAX_REMEMBERED else self._parse)(data)
        if head.status >= 200:
            return self._begin(request, head)
        if head.status == 101:
            raise BadAnswer("the target switched protocols, which nobody asked for")
        if head.framing.length or head.framing.is_chunked:
            raise BadAnswer("an interim answer has a body")
        self._interims += 1
        if self._interims > MAX_INTERIMS:
            raise BadAnswer(f"more than {MAX_INTERIMS} interim answers came before an answer")
        if head.status == 100 or not request.minor_version:
            # 100 was answered by gmux already; HTTP/1.0 has no interim answers (RFC 9110 section 15.2). That the target
            # has begun to answer is said all the same: the request must not be sent again.
            return Interim(b"")
        return Interim(_http_head.without(head.lines, b"content-length") + _http_head.END)

    def _begin(self, request: HttpRequest, head: AnswerHead) -> Part:
        framing = head.framing
        lines = head.lines
        self._interims = 0
        self._idle_limit = head.idle_limit
        self._reusable = head.stays and not request.has_doubtful_body and self._count(head.requests_left)
        if request.binds or framing.schemes:
            self._authenticate(request, head)
        self.may_pipeline = head.may_pipeline and not self._is_private
        self._is_usual = self._requests_left is None and not self._is_private
        self._close = request.close
        length = 0
        if framing.is_chunked and not request.minor_version:
            lines = _http_head.without(lines, b"transfer-encoding")
        # RFC 9112 section 6.3, in its order.
        if head.status == 204:
            # It has neither field (RFC 9110 section 8.6, RFC 9112 section 6.1). Where they speak of a body, the target
            # may send it after all, late enough to be taken for the next answer.
            lines = _http_head.without(lines, b"content-length", b"transfer-encoding")
            self._reusable = self._reusable and not framing.length and not framing.is_chunked
        elif request.method == b"HEAD" or head.status == 304:
            pass
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

    def _authenticate(self, request: HttpRequest, head: AnswerHead) -> None:
        """Whose the connection is after an exchange that spoke of this."""
        tokens = head.framing.schemes
        if request.binds and head.status in (401, 407) and not tokens and not self._is_private:
            # Nobody is authenticated, as far as can be told. To keep it for the client would cost the others its place.
            self._reusable = False
        elif request.binds or _http_authentication.is_step(tokens):
            self._is_private = True

    def _count(self, requests_left: int | None) -> bool:
        """Whether the target takes another request, by what it said now and before."""
        before = self._requests_left
        if before is not None:
            before -= 1
            requests_left = before if requests_left is None else min(before, requests_left)
        self._requests_left = requests_left
        return requests_left is None or requests_left > 0
