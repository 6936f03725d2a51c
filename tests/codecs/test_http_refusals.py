"""What a client of HTTP is told when gmux must answer itself, and in which form: RFC 9110 section 12.5.1, RFC 9457."""

from __future__ import annotations

import json

import pytest

from gmux.codecs.base import Limits, Request
from gmux.codecs.http import HttpCodec
from gmux.errors import FramingError, MessageTooLarge, QueueTimeout

HTTP = HttpCodec(Limits(max_message=10))

TEXT = b"text/plain; charset=utf-8"
JSON = b"application/json"
PROBLEM = b"application/problem+json"


def request(*fields: bytes, line: bytes = b"GET / HTTP/1.1") -> Request:
    decoder = HTTP.request_decoder()
    decoder.receive_data(b"\r\n".join([line, b"Host: a", *fields, b"\r\n"]))
    event = decoder.next_event()
    assert isinstance(event, Request)
    return event


def refuse(*fields: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """The fields and the body of a refusal of a request with `fields`."""
    data = HTTP.refuse(QueueTimeout('no "upstream" connection'), request(*fields)).data
    head, _, body = data.partition(b"\r\n\r\n")
    line, *lines = head.split(b"\r\n")
    assert line == b"HTTP/1.1 503 Service Unavailable"
    found = dict(field.split(b": ", 1) for field in lines)
    assert int(found[b"Content-Length"]) == len(body)
    return found, body


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ([], TEXT),
        ([b"Accept:"], TEXT),
        ([b"Accept: */*"], TEXT),
        ([b"Accept: text/plain"], TEXT),
        ([b"Accept: application/json"], JSON),
        ([b"accept:application/json"], JSON),
        ([b"ACCEPT: Application/JSON; charset=utf-8"], JSON),
        ([b"Accept: application/problem+json"], PROBLEM),
        ([b"Accept: application/*"], PROBLEM),
        # What browsers, and the usual libraries for them, send.
        ([b"Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], TEXT),
        ([b"Accept: application/json, text/plain, */*"], JSON),
        ([b"Accept: text/plain;q=0.5, application/json"], JSON),
        ([b"Accept: application/json;q=0.4, */*;q=0.5"], TEXT),
        ([b"Accept: application/json;q=0"], TEXT),
        ([b"Accept: application/json;q=0.000, text/*;q=0.001"], TEXT),
        ([b"Accept: image/png", b"Accept: application/json"], JSON),
        ([b"Accept: image/png"], TEXT),
        ([b"Accept: application/json;q=x, ;;q=,,/"], JSON),
        ([b"X-Accept: application/json"], TEXT),
    ],
)
def test_refusal_is_in_the_form_that_the_client_accepts(accept, kind):
    fields, _ = refuse(*accept)
    assert fields[b"Content-Type"] == kind
    assert fields[b"Server"] == b"gmux"
    assert fields[b"Retry-After"] == b"1"


@pytest.mark.parametrize("kind", [JSON, PROBLEM])
def test_refusal_in_json_says_all_that_is_known(kind):
    _, body = refuse(b"Accept: " + kind)
    assert json.loads(body) == {
        "status": 503,
        "title": "Service Unavailable",
        "detail": 'no "upstream" connection',
        "cause": "pool/queue",
    }


def test_refusal_in_text_is_one_line():
    assert refuse()[1] == b'gmux: no "upstream" connection\n'


def test_refusal_does_not_look_for_accept_in_a_body():
    post = request(b"Content-Length: 10", line=b"POST / HTTP/1.1")
    post.data += b"\r\nAccept: application/json\r\n"
    assert b"\r\nContent-Type: text/plain" in HTTP.refuse(QueueTimeout("why"), post).data


@pytest.mark.parametrize("field", [b"Content-Length: 11", b"Transfer-Encoding: chunked"])
def test_refusal_of_a_body_too_large_knows_its_request(field):
    """The request is out before its body is looked at, so the refusal is in its form, and its client's connection ends
    when the caller says that the rest is not here."""
    decoder = HTTP.request_decoder()
    decoder.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n" + field + b"\r\n\r\nb\r\n")
    incoming = decoder.next_event()
    assert isinstance(incoming, Request) and not incoming.whole
    with pytest.raises(MessageTooLarge) as caught:
        decoder.next_event()
    incoming.close = True
    refusal = HTTP.refuse(caught.value, incoming)
    assert refusal.close
    assert b"\r\nContent-Type: application/json\r\n" in refusal.data
    assert b"\r\nConnection: close\r\n\r\n" in refusal.data


def test_refusal_of_what_is_no_request_is_text_and_ends_the_connection():
    refusal = HTTP.refuse(FramingError("why"), None)
    assert refusal.close
    assert refusal.data.endswith(b"\r\nConnection: close\r\n\r\ngmux: why\n")
