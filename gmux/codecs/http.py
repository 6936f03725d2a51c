"""HTTP/1.1 and 1.0 (RFC 9112): requests of many clients, one after another, on connections that stay open.

No https, no websocket, no CONNECT. A request's body is taken whole before the request goes on; an answer goes on as
it comes. What is sent to either side is written by gmux from the parsed head, never copied, and its body length is
stated exactly once.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import cast

from gmux.codecs._http_answer import HttpAnswerDecoder
from gmux.codecs._http_head import parse_answer
from gmux.codecs._http_probe import HttpProbe
from gmux.codecs._http_refusal import refuse
from gmux.codecs._http_request import HttpRequest, HttpRequestDecoder
from gmux.codecs._http_rewriting import Rewriting
from gmux.codecs.base import Limits, Refusal, Request
from gmux.errors import ConfigError, ExchangeError, FramingError

#: Heads of answers whose meaning is remembered.
REMEMBERED = 256


class HttpCodec:
    """`via`, `forwarded`, `set_header` and `host` are the settings of these names; `authority` is the target's own.

    What they do says `Rewriting`.
    """

    name = "http"
    summary = "HTTP/1.1 and 1.0, no https, no websocket"
    correlation = "order"

    def __init__(
        self,
        limits: Limits,
        via: bool = True,
        forwarded: str = "off",
        set_header: tuple[tuple[str, str], ...] = (),
        host: str = "",
        authority: str = "",
    ) -> None:
        self._limits = limits
        self._rewriting = Rewriting(via, forwarded, set_header, host, authority)
        self._parse_answer = partial(parse_answer, via)
        # A target sends the same head again and again, above all a device; what it means depends on its bytes alone.
        self._remembered_answer = lru_cache(maxsize=REMEMBERED)(self._parse_answer)

    def request_decoder(self, client: str = "") -> HttpRequestDecoder:
        return HttpRequestDecoder(self._limits, self._rewriting, client)

    def answer_decoder(self) -> HttpAnswerDecoder:
        return HttpAnswerDecoder(self._limits, self._parse_answer, self._remembered_answer)

    def make_request(self, message: bytes) -> Request:
        raise FramingError("http has no greeting")

    def make_echo_test(self, number: int, when: str) -> Request:
        raise ConfigError("--idle-check: http has no echo test")

    def make_probe(self, depth: int, token: str) -> HttpProbe:
        return HttpProbe(self._make_harmless, self._rewriting.authority, token, depth)

    def _make_harmless(self, head: bytes) -> HttpRequest:
        """The request with this head, without a body, as if a client had sent it."""
        decoder = self.request_decoder()
        decoder.receive_data(head)
        return cast(HttpRequest, decoder.next_event())

    def refuse(self, error: ExchangeError, request: Request | None) -> Refusal:
        return refuse(error, cast("HttpRequest | None", request))

    def describe(self, message: bytes) -> str:
        return f"{len(message)} bytes"

    def redact(self, message: bytes) -> bytes:
        return message
