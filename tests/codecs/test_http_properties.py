"""HTTP with any bytes: what is valid comes through the same, and what comes through at all is valid and alone.

The judge is h11, which shares no code with gmux. Where h11 is the laxer one (bare LF, folded lines, codings that hide
others), the checks of `strict_head` come first.
"""

from __future__ import annotations

import re

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from gmux.codecs.base import Limits, Request
from gmux.codecs.http import HttpCodec
from gmux.errors import BadAnswer, FramingError

from .support import cuts
from .test_http_requests import ACCEPTED, REFUSED

LIMITS = Limits(max_message=4096, max_head=4096)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n"
GET_10 = b"GET / HTTP/1.0\r\n\r\n"

TOKEN = "!#$%&'*+-.^`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
#: Never an end-to-end field with another meaning for gmux: all of these begin with `x`.
names = st.text(TOKEN + "_", max_size=8).map(lambda text: b"x" + text.encode())
values = st.binary(max_size=12).map(lambda data: re.sub(rb"[\x00-\x1f\x7f]", b"", data).strip(b" "))
fields = st.lists(st.tuples(names, values), max_size=5)
methods = st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"PATCH", b"OPTIONS", b"M-SEARCH", b"HEAD"])
targets = st.text("/abc?&=%20[]{}|\\^`\"<>.;:@!$'()*+,~-_", max_size=12).map(lambda text: b"/" + text.encode())
hosts = st.sampled_from([b"a", b"a.b:80", b"[::1]:8080", b""])
bodies = st.binary(max_size=60) | st.sampled_from([b"0\r\n\r\n", b"GET / HTTP/1.1\r\nHost: b\r\n\r\n"])
extensions = st.sampled_from([b"", b";a", b';a="b c"', b" ;a=b"])
hop_by_hop = st.lists(
    st.sampled_from([b"Connection: keep-alive", b"Keep-Alive: 5", b"TE: a", b"Proxy-Connection: x", b"Upgrade: y"]),
    max_size=2,
)


@st.composite
def chunked(draw, body: bytes, trailers: list[tuple[bytes, bytes]]) -> bytes:
    wire = b""
    while body:
        size = draw(st.integers(1, len(body)))
        number = draw(st.sampled_from([b"%x", b"%X", b"%04x"])) % size
        wire += number + draw(extensions) + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return wire + b"0\r\n" + b"".join(name + b": " + value + b"\r\n" for name, value in trailers) + b"\r\n"


@st.composite
def framed(draw, body: bytes, trailers: list[tuple[bytes, bytes]]) -> tuple[list[bytes], bytes]:
    """The fields that say where `body` ends, and the body on the wire."""
    if trailers or draw(st.booleans()):
        return [b"Transfer-Encoding: chunked"], draw(chunked(body, trailers))
    return ([b"Content-Length: %d" % len(body)] if body or draw(st.booleans()) else []), body


@st.composite
def requests(draw):
    """A valid request on the wire, and what it means."""
    method, target, host, own = draw(methods), draw(targets), draw(hosts), draw(fields)
    body = draw(bodies)
    trailers = draw(st.just([]) | fields)
    length, wire = draw(framed(body, trailers))
    lines = [b"Host: " + host, *(name + b": " + value for name, value in own), *length, *draw(hop_by_hop)]
    lines = draw(st.permutations(lines))
    order = [(name, value) for line in lines for name, _, value in [line.partition(b": ")] if name[:1] == b"x"]
    head = b"\r\n".join([method + b" " + target + b" HTTP/1.1", *lines, b"\r\n"])
    return head + wire, (method, target, host, order, body, trailers)


@st.composite
def answers(draw):
    """A valid answer on the wire to a GET, and what it means; its end may be the connection's."""
    status, own, body = draw(st.sampled_from([200, 201, 404, 500])), draw(fields), draw(bodies)
    trailers = draw(st.just([]) | fields)
    length, wire = draw(framed(body, trailers))
    has_end = bool(length)
    lines = draw(st.permutations([*(name + b": " + value for name, value in own), *length, *draw(hop_by_hop)]))
    order = [(name, value) for line in lines for name, _, value in [line.partition(b": ")] if name[:1] == b"x"]
    head = b"\r\n".join([b"HTTP/1.1 %d Some reason" % status, *lines, b"\r\n"])
    return head + wire, has_end, (status, order, body, trailers)


#: What attacks are made of.
splinters = st.sampled_from(
    [
        *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b"\x0b", b"\r\n\r\n", b":", b",", b";", b"-", b"+", b"_", b"\xff"),
        *(b"0\r\n\r\n", b"0\r\n", b"1", b"f", b"0x", b"chunked", b"HTTP/1.0", b"HTTP/1.1", b"http://b", b"Host: b\r\n"),
        *(b"Content-Length: 3\r\n", b"Content-Length: 0\r\n", b"Connection: close, host, content-length\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding:\r\n chunked\r\n", b"Transfer-Encoding: x\r\n"),
        *(GET, b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 204 X\r\n", b"HTTP/1.1 103 X\r\n\r\n"),
    ]
)


@st.composite
def mutated(draw, wires) -> bytes:
    """Valid messages with a few bytes taken away, put in or written over."""
    data = b"".join(draw(st.lists(wires, min_size=1, max_size=3)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 0, 1, 2, 9])))
        data = data[:start] + draw(splinters | st.binary(max_size=2)) + data[end:]
    return data


TABLE = [raw for _, raw, _ in ACCEPTED + REFUSED]


def strict_head(message: bytes) -> None:
    """What h11 lets pass and others may read differently."""
    head = message.partition(b"\r\n\r\n")[0]
    assert re.search(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]|\0", head) is None, message
    names = [line.partition(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    framing = [name for name in names if name.replace(b"_", b"-") in (b"content-length", b"transfer-encoding")]
    assert len(framing) <= 1, message
    assert not framing or b"_" not in framing[0], message
    assert all(re.fullmatch(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) for name in names), message


def h11_messages(role, data: bytes, method: bytes = b"GET", at_end: bool = False):
    """The one message in `data` as h11 reads it: its head, body and trailers. Fails when it is not one, and alone."""
    peer = h11.Connection(role, max_incomplete_event_size=1 << 20)
    if role is h11.CLIENT:
        peer.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        peer.send(h11.EndOfMessage())
    peer.receive_data(data)
    if at_end:
        peer.receive_data(b"")
    head, body, interim = None, b"", 0
    while True:
        event = peer.next_event()
        if isinstance(event, h11.InformationalResponse):
            interim += 1
        elif isinstance(event, (h11.Request, h11.Response)):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert peer.trailing_data[0] == b"", f"more than one message in {data!r}"
            return head, body, [(bytes(name), bytes(value)) for name, value in event.headers]
        else:
            raise AssertionError(f"{event!r}: not one message: {data!r}")


def sent_on(pieces: list[bytes]) -> tuple[list[tuple[Request, bytes]], bool]:
    """The whole requests that go on, and whether the decoder refused the rest. Any other error is a failure."""
    decoder = HttpCodec(LIMITS).request_decoder()
    done: list[tuple[Request, bytes]] = []
    request, data = None, b""
    try:
        for piece in pieces:
            decoder.receive_data(piece)
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Request):
                    request = event
                else:
                    data += event.data
                if event.whole if isinstance(event, Request) else event.last:
                    done.append((request, request.data + data))
                    data = b""
            decoder.take_owed()
    except FramingError:
        return done, True
    return done, False


def read_request(data: bytes):
    """What the one request in `data` means to h11."""
    strict_head(data)
    head, body, trailers = h11_messages(h11.SERVER, data)
    raw = [(bytes(name), bytes(value)) for name, value in head.headers.raw_items()]
    assert head.http_version == b"1.1"
    host = [value for name, value in raw if name.lower() == b"host"]
    assert len(host) == 1
    return bytes(head.method), bytes(head.target), host[0], raw, body, trailers


def lowered(pairs):
    return [(name.lower(), value) for name, value in pairs]


@given(wires=st.lists(requests(), min_size=1, max_size=3), data=st.data())
def test_valid_requests_under_any_cuts_mean_the_same_to_the_target(wires, data):
    pieces = data.draw(cuts(b"".join(wire for wire, _ in wires)))
    done, is_refused = sent_on(pieces)
    assert not is_refused
    assert len(done) == len(wires)
    for (request, sent), (_, meaning) in zip(done, wires, strict=True):
        method, target, host, order, body, trailers = meaning
        got = read_request(sent)
        own = [(name, value) for name, value in got[3] if name[:1] == b"x"]
        assert (*got[:3], own, got[4], got[5]) == (method, target, host, order, body, lowered(trailers))
        assert request.method == method
        left = {name.lower() for name, _ in got[3] if name[:1] != b"x"}
        assert left <= {b"host", b"content-length", b"transfer-encoding", b"via", b"connection"}


@given(raw=mutated(requests().map(lambda pair: pair[0])), data=st.data())
def test_mutated_requests_that_go_on_are_what_a_strict_parser_reads(raw, data):
    check_whatever(data.draw(cuts(raw)))


@given(raw=mutated(st.sampled_from(TABLE)), data=st.data())
def test_mutated_attacks_that_go_on_are_what_a_strict_parser_reads(raw, data):
    check_whatever(data.draw(cuts(raw)))


@given(data=st.lists(st.binary(min_size=1, max_size=40) | splinters, min_size=1, max_size=8))
@example(data=[b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_random_bytes_to_the_request_decoder_raise_nothing_undeclared(data):
    check_whatever(data)


def check_whatever(pieces: list[bytes]) -> None:
    done, _ = sent_on(pieces)
    for request, sent in done:
        method, *_ = read_request(sent)
        assert request.method == method
    # Where the cuts are changes neither what goes on nor whether the rest is refused.
    whole, is_refused = sent_on([b"".join(pieces)]) if pieces else ([], False)
    assert [read_request(sent) for _, sent in whole] == [read_request(sent) for _, sent in done]
    assert is_refused == sent_on(pieces)[1]


def answered(raw: bytes, pieces: list[bytes], at_end: bool):
    """What goes to the client, and the last part, or None when the answer is no answer or not complete."""
    decoder = answer_decoder(raw)
    out = b""
    try:
        for piece in [*pieces, *([b""] if at_end else [])]:
            if piece:
                decoder.receive_data(piece)
            else:
                decoder.receive_eof()
            while (part := decoder.next_event()) is not None:
                out += part.data
                if part.last:
                    return out, part
    except BadAnswer:
        return out, None
    return out, None


def answer_decoder(raw: bytes):
    codec = HttpCodec(LIMITS)
    requests, answers = codec.request_decoder(), codec.answer_decoder()
    requests.receive_data(raw)
    answers.request = requests.next_event()
    return answers


@given(pair=answers(), request=st.sampled_from([GET, GET_10]), data=st.data())
def test_valid_answers_under_any_cuts_mean_the_same_to_the_client(pair, request, data):
    wire, has_end, (status, order, body, trailers) = pair
    out, last = answered(request, data.draw(cuts(wire)), at_end=not has_end)
    assert last is not None
    assert last.reusable is has_end
    strict_head(out)
    head, got_body, got_trailers = h11_messages(h11.CLIENT, out, at_end=last.close)
    own = [(bytes(name), bytes(value)) for name, value in head.headers.raw_items() if name[:1] == b"x"]
    assert (head.status_code, own, got_body) == (status, order, body)
    assert got_trailers == (lowered(trailers) if request is GET else [])
    if request is GET_10:
        assert last.close
        assert b"transfer-encoding" not in dict(head.headers)


@given(
    raw=mutated(answers().map(lambda triple: triple[0])),
    request=st.sampled_from([GET, HEAD, GET_10]),
    at_end=st.booleans(),
    data=st.data(),
)
def test_mutated_answers_that_go_on_are_one_answer_to_a_strict_parser(raw, request, at_end, data):
    out, last = answered(request, data.draw(cuts(raw)), at_end)
    whole, whole_last = answered(request, [raw], at_end)
    assert (last is None) == (whole_last is None)
    if last is None:
        return
    method = request.split(b" ")[0]
    at_close = last.close
    for answer in (out, whole):
        final = re.sub(rb"\A(HTTP/1\.1 1\d\d .*?\r\n\r\n)+", b"", answer, flags=re.DOTALL)
        strict_head(final)
    one, other = (h11_messages(h11.CLIENT, answer, method, at_close) for answer in (out, whole))
    assert (one[0].status_code, one[0].headers, one[1:]) == (other[0].status_code, other[0].headers, other[1:])
    assert (last.close, last.reusable) == (whole_last.close, whole_last.reusable)


@given(data=st.lists(st.binary(min_size=1, max_size=40) | splinters, min_size=1, max_size=8), at_end=st.booleans())
def test_random_bytes_to_the_answer_decoder_raise_nothing_undeclared(data, at_end):
    answered(GET, data, at_end)
