"""Which requests and answers make an upstream connection the client's own: RFC 4559, RFC 9110 section 11, [MS-NTHT]."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux.codecs.base import Limits, Part, PrivatePart
from gmux.codecs.http import HttpCodec

from .support import cuts

HTTP = HttpCodec(Limits())

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def request(*fields: bytes, line: bytes = b"GET / HTTP/1.1"):
    decoder = HTTP.request_decoder()
    decoder.receive_data(b"\r\n".join([line, b"Host: a", *fields, b"\r\n"]))
    return decoder.next_event()


def answer(*fields: bytes, status: bytes = b"401 Unauthorized", body: bytes = b"ok") -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + status, *fields, b"Content-Length: %d" % len(body), b"", body])


def last(decoder, asked, data: bytes, pieces: list[bytes] | None = None) -> Part:
    """The last part of the answer `data` to a request."""
    decoder.request = asked
    for piece in pieces or [data]:
        decoder.receive_data(piece)
        while (part := decoder.next_event()) is not None:
            if part.last:
                return part
    raise AssertionError("no last part")


def state(part: Part) -> str:
    if isinstance(part, PrivatePart):
        assert not part.reusable
        return "private"
    return "shared" if part.reusable else "closed"


CREDENTIALS = [
    b"Authorization: NTLM TlRM",
    b"authorization: ntlm TlRM",
    b"AUTHORIZATION:\tNtLm\tTlRM",
    b"Authorization: Negotiate YII=",
    b"Authorization: Negotiate",
    b"Authorization: Kerberos YII=",
    b"Authorization: CredSSP AAAA",
    b"Authorization: Nego2 AAAA",
    b"Authorization: Negotiate:Kerberos AAAA",
    b"Proxy-Authorization: NTLM TlRM",
    b"proxy-AUTHORIZATION: negotiate YII=",
    b"Authorization: Basic eDp5, NTLM TlRM",
    b"Authorization: ,NTLM TlRM",
    b"Authorization: \xa0NTLM\xa0TlRM",
    b"Authorization: Basic eDp5\r\nAuthorization: NTLM TlRM",
]
NO_CREDENTIALS = [
    b"X: NTLM TlRM",
    b"Authorization: Basic bnRsbTp4",
    b"Authorization: Basic /NTLM+NTLM=",
    b'Authorization: Digest username="negotiate", realm="NTLM"',
    b"Authorization: Bearer NTLM",
    b"Authorization:",
    b"Authorization: X-NTLM TlRM",
    b"WWW-Authenticate: NTLM TlRM",
]


@pytest.mark.parametrize("line", [b"GET / HTTP/1.1", b"HEAD / HTTP/1.1", b"OPTIONS / HTTP/1.1", b"PUT / HTTP/1.1"])
@pytest.mark.parametrize("field", CREDENTIALS)
def test_request_with_credentials_for_the_connection_binds_it(field, line):
    asked = request(field, line=line)
    assert asked.binds
    assert not asked.pipelines
    assert not asked.repeatable
    assert field.split(b"\r\n")[-1].partition(b":")[0] in asked.data


@pytest.mark.parametrize("field", NO_CREDENTIALS)
def test_request_without_such_credentials_does_not(field):
    asked = request(field)
    assert not asked.binds
    assert asked.pipelines
    assert asked.repeatable


@pytest.mark.parametrize("name", ["Authorization", "AUTHORIZATION"])
def test_credentials_that_do_not_go_on_bind_nothing(name):
    decoder = HttpCodec(Limits(), set_header=((name, ""),)).request_decoder()
    decoder.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: NTLM TlRM\r\n\r\n")
    assert not decoder.next_event().binds
    assert not request(b"Authorization: NTLM TlRM", b"Connection: Authorization").binds
    assert request(b"Authorization: NTLM TlRM", b"Proxy-Authorization: NTLM x", b"Connection: Authorization").binds


def test_private_connection_stays_so_until_it_ends():
    decoder = HTTP.answer_decoder()
    plain = request()
    assert state(last(decoder, plain, OK)) == "shared"
    assert decoder.may_pipeline
    assert state(last(decoder, request(CREDENTIALS[0]), OK)) == "private"
    for data in (OK, answer(), answer(status=b"204 No Content", body=b""), answer(body=b"x" * 3000)):
        assert state(last(decoder, plain, data)) == "private"
        assert not decoder.may_pipeline
    assert state(last(decoder, request(line=b"HEAD / HTTP/1.1"), OK[:-2])) == "private"
    assert state(last(decoder, plain, answer(b"Connection: close"))) == "closed"


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"


@pytest.mark.parametrize("data", [OK, CHUNKED, b"HTTP/1.1 204 No Content\r\n\r\n", answer(b"Keep-Alive: timeout=7")])
@pytest.mark.parametrize("field", [b"", b"Connection: close"])
@given(draw=st.data())
def test_private_answer_is_the_same_as_another_but_for_whose_the_connection_is(data, field, draw):
    asked = request(*[field] * bool(field))
    usual, private = HTTP.answer_decoder(), HTTP.answer_decoder()
    last(private, request(CREDENTIALS[0]), OK)
    one = last(usual, asked, data)
    other = last(private, asked, data, draw.draw(cuts(data)))
    assert (state(one), state(other)) == ("shared", "private")
    assert (one.close, one.idle_limit) == (other.close, other.idle_limit)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        # A step of a handshake.
        ([b"WWW-Authenticate: NTLM TlRM"], "private"),
        ([b"www-authenticate: negotiate oYG2"], "private"),
        ([b"Proxy-Authenticate: NTLM TlRM"], "private"),
        ([b"WWW-Authenticate: Basic realm=x, NTLM TlRM"], "private"),
        ([b'WWW-Authenticate: Basic realm="a, b",NTLM TlRM, Negotiate'], "private"),
        ([b"WWW-Authenticate: Negotiate", b"WWW-Authenticate: NTLM TlRM"], "private"),
        ([b"WWW-Authenticate: CredSSP AAAA"], "private"),
        # Offers.
        ([b"WWW-Authenticate: NTLM"], "shared"),
        ([b"WWW-Authenticate: Negotiate", b"WWW-Authenticate: NTLM", b"WWW-Authenticate: Basic realm=x"], "shared"),
        ([b"WWW-Authenticate: Negotiate, NTLM , Basic realm=x"], "shared"),
        ([b'WWW-Authenticate: Basic realm="a, NTLM b"'], "shared"),
        ([b'WWW-Authenticate: Basic realm="a\\", NTLM b"'], "shared"),
        ([b"WWW-Authenticate: Digest nonce=NTLM"], "shared"),
        ([b"X: NTLM TlRM"], "shared"),
        # IIS puts a hint behind each offer of it.
        ([b"WWW-Authenticate: Nego2 YHYG"], "shared"),
        ([b"WWW-Authenticate: NTLM", b"WWW-Authenticate: Nego2 YHYG", b"WWW-Authenticate: Negotiate"], "shared"),
    ],
)
@pytest.mark.parametrize("status", [b"401 Unauthorized", b"200 OK"])
def test_answer_to_a_request_without_credentials(fields, expected, status):
    for line in (b"GET / HTTP/1.1", b"GET / HTTP/1.0\r\nConnection: keep-alive"):
        data = answer(*fields, status=status)
        for _ in range(2):  # the second time its meaning is remembered
            assert state(last(HTTP.answer_decoder(), request(line=line), data)) == expected


@pytest.mark.parametrize(
    ("fields", "status", "expected"),
    [
        ([], b"200 OK", "private"),
        ([], b"404 Not Found", "private"),
        ([b"WWW-Authenticate: NTLM TlRM"], b"401 Unauthorized", "private"),
        ([b"WWW-Authenticate: Nego2 oYG2"], b"401 Unauthorized", "private"),
        ([b"Proxy-Authenticate: NTLM TlRM"], b"407 Proxy Authentication Required", "private"),
        # Declined.
        ([b"WWW-Authenticate: NTLM"], b"401 Unauthorized", "closed"),
        ([b"Proxy-Authenticate: NTLM"], b"407 Proxy Authentication Required", "closed"),
        ([], b"401 Unauthorized", "closed"),
        ([b"Connection: close"], b"200 OK", "closed"),
    ],
)
def test_answer_to_a_request_with_credentials(fields, status, expected):
    decoder = HTTP.answer_decoder()
    assert state(last(decoder, request(CREDENTIALS[0]), answer(*fields, status=status))) == expected


@given(st.lists(st.sampled_from([b"ntlm", b"NTLM x", b",", b" ", b'"', b"\\", b"=", b"\t", b"\xff"]), max_size=12))
def test_anything_may_stand_in_these_fields(pieces):
    value = b"".join(pieces)
    asked = request(b"Authorization: " + value)
    assert asked is None or isinstance(asked.binds, bool)
    last(HTTP.answer_decoder(), request(), answer(b"WWW-Authenticate: " + value))


@pytest.mark.parametrize("piece", [b'"', b'\\"', b'"\\', b", ", b"ntlm ", b",\t"])
def test_long_fields_cost_no_more_than_their_length(piece):
    value = piece * (30_000 // len(piece))
    for _ in range(20):
        request(b"Authorization: " + value)
        decoder = HttpCodec(Limits()).answer_decoder()
        last(decoder, request(), answer(b"WWW-Authenticate: " + value))
