"""A refused HEAD has no content, whatever is the matter with it (RFC 9110 section 9.3.2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import NamedTuple

import pytest

from gmux.codecs.base import Limits
from gmux.codecs.http import HttpCodec
from gmux.errors import FramingError, RequestTimeout
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import Service, serving
from tests.support.target import Target, close, closed_port, never, send
from tests.support.wait import wait_until


class Case(NamedTuple):
    """`rest` is behind the method; `what` the target does."""

    status: int
    name: str
    rest: bytes
    what: tuple = ()
    settings: Mapping[str, str] = MappingProxyType({})
    is_down: bool = False


def head(*fields: bytes, line: bytes = b"/ HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join([line, host, *fields, b"\r\n"])


BODY = b"Content-Length: 20"

CASES = [
    Case(400, "no host", b"/ HTTP/1.1\r\n\r\n"),
    Case(400, "malformed host", head(host=b"Host: a b")),
    Case(400, "malformed length", head(b"Content-Length: x")),
    Case(400, "bare LF", b"/ HTTP/1.1\nHost: a\n\n"),
    Case(400, "what does not begin as a request", b"/\r\n"),
    Case(408, "time over in the request line", b"/ HT", settings={"request_timeout": "50ms"}),
    Case(408, "time over in the head", b"/ HTTP/1.1\r\nHo", settings={"request_timeout": "50ms"}),
    Case(408, "time over in the body", head(BODY) + b"x", settings={"request_timeout": "50ms"}),
    Case(413, "body too large", head(BODY), settings={"max_message": "10"}),
    Case(413, "chunk too large", head(b"Transfer-Encoding: chunked") + b"20\r\n", settings={"max_message": "10"}),
    Case(414, "endless request line", b"/" + b"a" * 40_000),
    Case(414, "long request line", head(line=b"/" + b"a" * 9000 + b" HTTP/1.1")),
    Case(417, "expectation", head(b"Expect: wonders")),
    Case(431, "endless head", b"/ HTTP/1.1\r\nHost: a\r\nA: " + b"a" * 40_000),
    Case(431, "whole head, too long", head(b"A: " + b"a" * 40_000)),
    Case(431, "too many fields", head(*[b"A: a"] * 101)),
    Case(501, "coding", head(b"Transfer-Encoding: gzip, chunked")),
    Case(502, "target down", head(), is_down=True),
    Case(502, "target closes", head(), (close,)),
    Case(502, "bad answer", head(), (send(b"what?\r\n\r\n"),)),
    Case(503, "queue full", head(), never, {"queue_limit": "0"}),
    Case(503, "queue timeout", head(), never, {"queue_timeout": "50ms"}),
    Case(503, "no memory", head(b"Content-Length: 5000000") + b"x" * 5_000_000, settings={"spool_limit": "70000"}),
    Case(504, "silent target", head(), never, {"timeout": "50ms"}),
    Case(505, "version", head(line=b"/ HTTP/3.0")),
]


@contextmanager
def scene(case: Case) -> Iterator[Service]:
    with ExitStack() as stack:
        settings = {"protocol": "http", "pool_min": "0"} | dict(case.settings)
        if case.is_down:
            yield stack.enter_context(serving(closed_port(), **settings))
        else:
            target = stack.enter_context(Target(case.what or never, HTTP))
            yield stack.enter_context(serving(target, **settings))
            target.close_all()


def occupy(stack: ExitStack, service: Service) -> None:
    """The one connection waits for an answer that does not come."""
    client = stack.enter_context(Client(service.address, HTTP))
    client.send_raw(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    wait_until(lambda: any(u.used for u in service.pool._upstreams))


def told(service: Service, request: bytes) -> tuple[int, bytes]:
    """The status, and all that comes behind the head until gmux closes or is asked something that has a body."""
    with Client(service.address, HTTP) as client:
        client.send_raw(request)
        answer = client.until(b"\r\n\r\n")
        assert b"\r\nServer: gmux\r\n" in answer
        assert int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]) > 0
        if b"\r\nConnection: close\r\n" not in answer:
            # Malformed, so that it ends: what comes next must be its answer and not a body.
            client.send_raw(b"x y z\r\n\r\n")
            rest = client.rest()
            assert rest.startswith(b"HTTP/1.1 400 "), rest
            return int(answer[9:12]), b""
        return int(answer[9:12]), client.rest()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.status} {case.name}")
def test_refused_head_has_no_content(case):
    with scene(case) as service, ExitStack() as stack:
        if case.name.startswith("queue"):
            occupy(stack, service)
        assert told(service, b"HEAD " + case.rest) == (case.status, b"")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.status} {case.name}")
def test_refusal_of_the_same_with_another_method_has_its_content(case):
    with scene(case) as service, ExitStack() as stack, Client(service.address, HTTP) as client:
        if case.name.startswith("queue"):
            occupy(stack, service)
        client.send_raw(b"PUT " + case.rest)
        assert b"gmux: " in HTTP.read(client)


def test_client_turned_away_that_has_sent_a_head_gets_no_content():
    with Target(never, HTTP) as target, serving(target, max_clients="1") as service, Client(service.address, HTTP):
        service.wait_clients(1)
        assert told(service, b"HEAD " + head()) == (503, b"")


HTTP_CODEC = HttpCodec(Limits(max_head=200))


@pytest.mark.parametrize("data", [b"HEAD ", b"HEAD / HT", b"HEAD /\r\n", b"\r\n\r\nHEAD /", b"HEAD / HTTP/1.1\r\n\r\n"])
def test_decoder_knows_a_head_that_is_begun_or_malformed(data):
    decoder = HTTP_CODEC.request_decoder()
    for at in range(len(data)):
        decoder.receive_data(data[at : at + 1])
        try:
            assert decoder.next_event() is None
        except FramingError:
            break
    begun = decoder.begun
    assert begun is not None and begun.close
    refusal = HTTP_CODEC.refuse(RequestTimeout("why"), begun)
    assert refusal.close and refusal.data.endswith(b"\r\n\r\n")


@pytest.mark.parametrize(
    "data", [b"", b"H", b"HEAD", b"HEADER / HTTP/1.1\r\n\r\n", b"head / ", b"GET / HEAD ", b"\r\n"]
)
def test_decoder_takes_nothing_else_for_a_head(data):
    decoder = HTTP_CODEC.request_decoder()
    if data:
        decoder.receive_data(data)
        with suppress(FramingError):
            decoder.next_event()
    assert decoder.begun is None
