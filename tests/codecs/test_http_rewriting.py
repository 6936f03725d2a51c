"""What gmux adds to heads, replaces in them and says in them of the client, by the settings of the codec."""

from __future__ import annotations

import math

import pytest

from gmux.codecs.base import Limits
from gmux.codecs.http import HttpCodec
from gmux.errors import ConfigError, FramingError, Unsupported

KEEP = b"Connection: keep-alive"
GET = [b"GET / HTTP/1.1", b"Host: a:80"]


def head(*lines: bytes) -> bytes:
    return b"\r\n".join([*lines, b"\r\n"])


def sent(*lines: bytes, client: str = "192.0.2.1", **settings) -> list[bytes]:
    """The lines of the head that goes to the target for the one with these lines."""
    decoder = HttpCodec(Limits(), **settings).request_decoder(client)
    decoder.receive_data(head(*lines))
    request = decoder.next_event()
    assert request.whole
    assert request.data.endswith(b"\r\n\r\n")
    return request.data[:-4].split(b"\r\n")


def told(answer: bytes, request: list[bytes] = GET, **settings) -> bytes:
    """What a client gets for the answer to its request."""
    codec = HttpCodec(Limits(), **settings)
    requests, answers = codec.request_decoder(), codec.answer_decoder()
    requests.receive_data(head(*request))
    answers.request = requests.next_event()
    answers.receive_data(answer)
    data = b""
    while (part := answers.next_event()) is not None:
        data += part.data
        if part.last:
            break
    return data


# Via, RFC 9110 section 7.6.3.


def test_via_is_added_to_requests_behind_those_of_other_proxies():
    assert sent(*GET, b"Via: 1.0 fred", b"A: b") == [*GET, b"Via: 1.0 fred", b"A: b", b"Via: 1.1 gmux", KEEP]


def test_via_names_the_version_that_the_client_spoke():
    assert sent(b"GET / HTTP/1.0", b"Host: a") == [b"GET / HTTP/1.1", b"Host: a", b"Via: 1.0 gmux", KEEP]


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_via_is_added_to_answers_with_the_version_that_the_target_spoke(version):
    fields = b"Connection: keep-alive\r\nContent-Length: 2\r\n\r\nok"
    out = told(b"HTTP/" + version + b" 200 OK\r\nVia: 1.1 fred\r\n" + fields)
    expected = b"HTTP/1.1 200 OK\r\nVia: 1.1 fred\r\nContent-Length: 2\r\nVia: " + version + b" gmux\r\n\r\nok"
    assert out == expected


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    ],
    ids=["204", "chunked", "long head", "interim"],
)
def test_via_is_added_to_each_head_of_an_answer(answer):
    heads = answer.count(b"HTTP/1.1 ")
    assert told(answer).count(b"\r\nVia: 1.1 gmux\r\n") == heads
    assert told(answer, via=False) == answer


def test_via_off_leaves_what_others_said():
    assert sent(*GET, b"Via: 1.0 fred", via=False) == [*GET, b"Via: 1.0 fred", KEEP]


# TE, RFC 9110 section 10.1.4.


@pytest.mark.parametrize("value", [b"trailers", b"gzip, Trailers", b"deflate;q=0.5,\ttrailers"])
def test_te_of_a_client_that_takes_trailers_goes_on_as_that(value):
    lines = sent(*GET, b"TE: " + value, b"Connection: TE", via=False)
    assert lines == [*GET, b"TE: trailers", b"Connection: keep-alive, TE"]


@pytest.mark.parametrize("value", [b"", b"gzip", b"xtrailers", b"trailers;q=0", b"chunked"])
def test_te_of_another_wish_stays_here(value):
    assert sent(*GET, b"TE: " + value, via=False) == [*GET, KEEP]


# --set-header and --host.


def test_set_header_replaces_all_of_the_name_and_is_added_where_there_is_none():
    lines = sent(*GET, b"X-A: 1", b"b: 2", b"x-a: 3", via=False, set_header=(("X-A", "own"), ("New", "")))
    assert lines == [*GET, b"b: 2", b"X-A: own", KEEP]


def test_set_header_given_twice_sets_two_fields():
    lines = sent(*GET, b"A: 0", via=False, set_header=(("A", "1"), ("A", "2\xe4")))
    assert lines == [*GET, b"A: 1", b"A: 2\xe4", KEEP]


def test_set_header_without_a_value_removes_the_field():
    assert sent(*GET, b"Cookie: a", b"B: c", via=False, set_header=(("cookie", ""),)) == [*GET, b"B: c", KEEP]


@pytest.mark.parametrize("own", ["X-User-Id", "X_User_Id", "x_user-id"])
@pytest.mark.parametrize("alike", [b"X_User_Id", b"x-user_id", b"X_USER-ID", b"X.User-Id", b"x-user-id"])
def test_set_header_removes_what_cgi_and_its_kin_take_for_the_field(alike, own):
    """All become HTTP_X_USER_ID there; the client's could be the one that counts."""
    lines = sent(*GET, alike + b": root", b"Other_Name: b", via=False, set_header=((own, "nobody"),))
    assert lines == [*GET, b"Other_Name: b", own.encode() + b": nobody", KEEP]


@pytest.mark.parametrize("alike", [b"X-User", b"x_user", b"X.USER"])
def test_set_header_removes_the_field_from_trailers_too(alike):
    decoder = HttpCodec(Limits(), set_header=(("X-User", "own"),)).request_decoder()
    body = b"0\r\n" + alike + b": mallory\r\nX-Sum: 1\r\n\r\n"
    decoder.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
    decoder.next_event()
    assert decoder.next_event().data == b"0\r\nX-Sum: 1\r\n\r\n"


def test_set_header_of_what_forwarded_writes_is_refused():
    HttpCodec(Limits(), set_header=(("X-Forwarded-For", "x"),))
    for name in ("X-Forwarded-For", "x_forwarded_proto", "Forwarded", "X-Real-IP"):
        with pytest.raises(ConfigError):
            HttpCodec(Limits(), forwarded="x-forwarded", set_header=((name, "x"),))


def test_set_header_is_not_taken_away_by_connection():
    lines = sent(*GET, b"Connection: X-A", b"X-A: 1", via=False, set_header=(("X-A", "own"),))
    assert lines == [*GET, b"X-A: own", KEEP]


def test_set_header_with_an_underscore_is_no_look_alike_of_a_length():
    assert sent(*GET, b"A_B: 1", via=False, set_header=(("A_B", "2"),)) == [*GET, b"A_B: 2", KEEP]
    with pytest.raises(FramingError):
        sent(*GET, b"Content_Length: 5", via=False, set_header=(("A_B", "2"),))


@pytest.mark.parametrize(
    "name",
    [
        "Host",
        "content-length",
        "Transfer-Encoding",
        "Connection",
        "Keep-Alive",
        "TE",
        "Trailer",
        "Upgrade",
        "Via",
        "Max-Forwards",
    ],
)
def test_set_header_of_a_field_that_gmux_writes_is_refused(name):
    with pytest.raises(ConfigError, match=f"^--set-header: '{name}' is not allowed: "):
        HttpCodec(Limits(), set_header=(("A", "b"), (name, "x")))


def test_trace_that_would_show_the_set_fields_is_refused():
    lines = [b"TRACE / HTTP/1.1", b"Host: a"]
    assert sent(*lines, via=False) == [*lines, KEEP]
    with pytest.raises(Unsupported):
        sent(*lines, set_header=(("Authorization", "Basic x"),))


def test_host_stands_for_what_the_client_asked_for():
    expected = [b"GET / HTTP/1.1", b"Host: own:8080", b"A: b", KEEP]
    assert sent(b"GET / HTTP/1.1", b"A: b", b"host: a", via=False, host="own:8080") == expected
    assert sent(b"GET http://b:1/ HTTP/1.1", b"Host: a", b"A: b", via=False, host="own:8080") == expected
    assert sent(b"GET / HTTP/1.0", b"A: b", via=False, host="own:8080") == expected


@pytest.mark.parametrize("line", [b"Host: a b", b"A: b"], ids=["invalid", "missing"])
def test_host_does_not_excuse_a_wrong_host(line):
    with pytest.raises(FramingError):
        sent(b"GET / HTTP/1.1", line, host="own")


# --forwarded.


CLAIMS = [
    b"X-Forwarded-For: 1.1.1.1",
    b"x-forwarded-host: b",
    b"X-Forwarded-Proto: https",
    b"Forwarded: for=1.1.1.1",
    b"X_Forwarded_For: 1.1.1.1",
    b"X-Forwarded-Ssl: on",
    b"x-forwarded-port: 443",
    b"X-Real-IP: 1.1.1.1",
    b"Front-End-Https: on",
]


def test_forwarded_off_passes_what_another_proxy_said():
    assert sent(*GET, *CLAIMS, via=False) == [*GET, *CLAIMS, KEEP]


@pytest.mark.parametrize(
    ("client", "shown"),
    [("192.0.2.1", b"192.0.2.1"), ("2001:db8::1", b"2001:db8::1"), ("fe80::1%eth0", b"fe80::1"), ("", b"unknown")],
)
def test_forwarded_x_forwarded_tells_the_client_and_nobody_else_may(client, shown):
    lines = sent(*GET, *CLAIMS, client=client, via=False, forwarded="x-forwarded")
    own = [b"X-Forwarded-For: " + shown, b"X-Forwarded-Proto: http", b"X-Forwarded-Host: a:80"]
    assert lines == [*GET, *own, KEEP]


@pytest.mark.parametrize(
    ("client", "shown"),
    [
        ("192.0.2.1", b"192.0.2.1"),
        ("2001:db8::1", b'"[2001:db8::1]"'),
        ("fe80::1%eth0", b'"[fe80::1]"'),
        ("", b"unknown"),
    ],
)
def test_forwarded_tells_the_client_in_the_form_of_rfc_7239(client, shown):
    lines = sent(*GET, *CLAIMS, client=client, forwarded="forwarded")
    assert lines == [*GET, b"Forwarded: for=" + shown + b';host="a:80";proto=http', b"Via: 1.1 gmux", KEEP]


def test_forwarded_without_a_host_leaves_it_out():
    old = [b"GET / HTTP/1.0"]
    assert sent(*old, forwarded="forwarded", via=False)[2:] == [b"Forwarded: for=192.0.2.1;proto=http", KEEP]
    assert sent(*old, forwarded="x-forwarded", via=False)[3:] == [b"X-Forwarded-Proto: http", KEEP]


def test_host_of_the_target_is_that_of_a_client_of_http_1_0_that_asks_for_none():
    """RFC 9112 section 3.3; nginx refuses an empty Host."""
    old = [b"GET / HTTP/1.0", b"A: b"]
    assert sent(*old, via=False, authority="t:80") == [b"GET / HTTP/1.1", b"Host: t:80", b"A: b", KEEP]
    assert sent(*old, via=False, authority="t:80", host="own")[1:3] == [b"Host: own", b"A: b"]


def test_forwarded_tells_the_host_of_the_request_where_it_is_rewritten():
    lines = sent(b"GET http://b/ HTTP/1.1", b"Host: a", via=False, host="own", forwarded="forwarded")
    assert lines == [b"GET / HTTP/1.1", b"Host: own", b'Forwarded: for=192.0.2.1;host="b";proto=http', KEEP]


# Keep-Alive of the target: RFC 2068 section 19.7.1.1.


def parts(answers: list[bytes]):
    """The last part of each answer on one connection."""
    codec = HttpCodec(Limits())
    decoder = codec.answer_decoder()
    for answer in answers:
        requests = codec.request_decoder()
        requests.receive_data(head(*GET))
        decoder.request = requests.next_event()
        decoder.receive_data(answer)
        yield decoder.next_event()


def kept(*values: bytes) -> list[bytes]:
    return [b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nKeep-Alive: " + value + b"\r\n\r\n" for value in values]


@pytest.mark.parametrize(
    ("value", "limit"),
    [
        (b"timeout=5", 5.0),
        (b"Timeout=5, max=100", 5.0),
        (b"max=100,timeout=5", 5.0),
        (b"max=100", math.inf),
        (b"300", math.inf),
        (b"timeout=5s", math.inf),
        (b"xtimeout=5", math.inf),
        (b"timeout=-5", math.inf),
        (b"timeout=99999999999", math.inf),
        (b"", math.inf),
    ],
)
def test_keep_alive_says_how_long_the_target_keeps_an_idle_connection(value, limit):
    (part,) = parts(kept(value))
    assert (part.idle_limit, part.reusable) == (limit, True)


def test_keep_alive_of_one_answer_is_not_that_of_the_next():
    plain = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
    assert [part.idle_limit for part in parts([*kept(b"timeout=5"), plain])] == [5.0, math.inf]


@pytest.mark.parametrize("value", [b"timeout=0", b"max=0", b"timeout=5, max=0"])
def test_keep_alive_of_nothing_ends_the_connection(value):
    (part,) = parts(kept(value))
    assert not part.reusable


@pytest.mark.parametrize(
    "values",
    [[b"max=2", b"max=1", b"max=0"], [b"max=2", b"max=2", b"max=2"], [b"max=2", b"", b""]],
    ids=["counted by the target", "always the same", "said once"],
)
def test_keep_alive_max_is_counted(values):
    """Some targets count down, others say the same each time; neither gets more than it said."""
    assert [part.reusable for part in parts(kept(*values))] == [True, True, False]
