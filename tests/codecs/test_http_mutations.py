"""HTTP that was valid before something was done to it: what an attacker or a broken peer sends.

However the bytes are cut, the same comes out: the same messages, and a refusal behind them or none. What goes on is
read with the strict reader, and holds as many messages as gmux says it does: never two where gmux sees one.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from gmux.codecs._http_request import CONTINUE
from gmux.codecs.base import Part, Request
from gmux.codecs.http import HttpCodec, HttpRequest
from gmux.errors import BadAnswer, FramingError
from tests.support import strict_http

from .support import by_byte, cuts, in_one
from .test_http_properties import GET, GET_10, HEAD, LIMITS, answers, requests, splinters
from .test_http_requests import ACCEPTED

POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"

#: Requests that go on, of each kind that has a rule of its own; the longest would make the others rare.
VALID = [raw for _, raw, _ in ACCEPTED if len(raw) < 1000]

#: What parsers disagree on.
controls = st.sampled_from([b"\r", b"\n", b"\0", b"\t", b"\x0b", b" ", b"\r\n", b"\n\n"])
odd_bytes = controls | st.integers(0x80, 0xFF).map(lambda byte: bytes([byte]))

#: What says again, or in another way, where a message ends or goes.
odd_lines = st.sampled_from(
    [
        *(b"Host: b", b"Content-Length: 1", b"Content-Length: 007", b"Content_Length: 1"),
        *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Connection: close, host"),
        *(b"A : b", b"A: b\r\n c", b" c", b"0", b"1", b""),
        *(b"GET /smuggled HTTP/1.1\r\nHost: a\r\n", b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 103 Early\r\n"),
    ]
)

#: Digits that say where something ends, and those of the version.
NUMBERS = re.compile(rb"(?<=content-length: )\d+|(?<=\r\n)[0-9a-f]+(?=[;\r])|(?<=HTTP/)\d\.\d", re.IGNORECASE)

Mutation = Callable[[st.DrawFn, bytes], bytes]


def a_slice(draw: st.DrawFn, data: bytes, longest: int = 9) -> slice:
    start = draw(st.integers(0, len(data)))
    return slice(start, min(len(data), start + draw(st.integers(0, longest))))


def insert(draw: st.DrawFn, data: bytes) -> bytes:
    at = draw(st.integers(0, len(data)))
    return data[:at] + draw(odd_bytes | splinters | st.binary(max_size=2)) + data[at:]


def delete(draw: st.DrawFn, data: bytes) -> bytes:
    cut = a_slice(draw, data)
    return data[: cut.start] + data[cut.stop :]


def replace(draw: st.DrawFn, data: bytes) -> bytes:
    cut = a_slice(draw, data, 2)
    return data[: cut.start] + draw(odd_bytes | st.binary(max_size=2)) + data[cut.stop :]


def duplicate(draw: st.DrawFn, data: bytes) -> bytes:
    cut = a_slice(draw, data, 40)
    return data[: cut.stop] + data[cut] + data[cut.stop :]


def change_case(draw: st.DrawFn, data: bytes) -> bytes:
    cut = a_slice(draw, data, 40)
    return data[: cut.start] + data[cut].swapcase() + data[cut.stop :]


def swap_lines(draw: st.DrawFn, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def duplicate_line(draw: st.DrawFn, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    line = draw(st.sampled_from(lines))
    lines.insert(draw(st.integers(0, len(lines))), line)
    return b"\r\n".join(lines)


def insert_line(draw: st.DrawFn, data: bytes) -> bytes:
    """A line that says something on its own, into a head, a body or the trailers."""
    lines = data.split(b"\r\n")
    lines.insert(draw(st.integers(1, len(lines))), draw(odd_lines))
    return b"\r\n".join(lines)


def repeat_in_head(draw: st.DrawFn, data: bytes) -> bytes:
    """A field of a head once more, in it."""
    head, end, rest = data.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    lines.insert(draw(st.integers(1, len(lines))), draw(st.sampled_from(lines)))
    return b"\r\n".join(lines) + end + rest


def insert_trailer(draw: st.DrawFn, data: bytes) -> bytes:
    body, end, rest = data.rpartition(b"\r\n0\r\n")
    return body + end + draw(odd_lines) + b"\r\n" + rest if end else data


def change_line_end(draw: st.DrawFn, data: bytes) -> bytes:
    at = draw(st.sampled_from([found.start() for found in re.finditer(b"\r\n", data)] or [0]))
    return data[:at] + draw(st.sampled_from([b"\n", b"\r", b"\n\r", b"\n\n", b"xx", b" \r\n", b""])) + data[at + 2 :]


def change_status(draw: st.DrawFn, data: bytes) -> bytes:
    """Of an answer; another status may forbid the body."""
    return re.sub(rb"(?<=^HTTP/1.1 )\d+", draw(st.sampled_from([b"204", b"304", b"100", b"103", b"101"])), data)


def change_number(draw: st.DrawFn, data: bytes) -> bytes:
    found = list(NUMBERS.finditer(data))
    if not found:
        return data
    number = draw(st.sampled_from(found))
    at = draw(st.integers(number.start(), number.end()))
    end = min(at + draw(st.integers(0, 1)), number.end())
    return data[:at] + draw(st.sampled_from(list("0123456789aF-+x_ "))).encode() + data[end:]


MUTATIONS: list[Mutation] = [
    *(insert, delete, replace, duplicate, change_case, swap_lines, duplicate_line),
    *(insert_line, insert_line, repeat_in_head, insert_trailer, change_line_end, change_status),
    *(change_number, change_number),
]


@st.composite
def mutated(draw: st.DrawFn, wires: st.SearchStrategy[bytes]) -> bytes:
    data = b"".join(draw(st.lists(wires, min_size=1, max_size=2)))
    # Mostly one: what is wrong in two ways is refused for one of them.
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        mutation = draw(st.sampled_from(MUTATIONS))
        data = mutation(draw, data)
    return data


# Requests.


def carried(pieces: list[bytes]) -> tuple[list[tuple[HttpRequest, bytes]], bool]:
    """The whole requests that go on, each with its bytes, and whether the rest was refused.

    Why is not told: of two faults the cuts decide which one is seen first.
    """
    decoder = HttpCodec(LIMITS).request_decoder()
    done: list[tuple[HttpRequest, bytes]] = []
    request: HttpRequest | None = None
    body = b""
    try:
        for piece in pieces:
            decoder.receive_data(piece)
            while (event := decoder.next_event()) is not None:
                if isinstance(event, Request):
                    assert request is None, "a request begins in another one"
                    request, body = event, b""
                    is_whole = event.whole
                else:
                    assert request is not None, "a part of no request"
                    body += event.data
                    is_whole = event.last
                if is_whole:
                    # Its head is taken when all of it is there, for the head may say how long it is.
                    done.append((request, request.data + body))
                    request = None
            assert decoder.take_owed() in (b"", CONTINUE)
    except FramingError:
        return done, True
    return done, False


def meaning(done: list[tuple[HttpRequest, bytes]]) -> list[object]:
    """What goes on, as the target reads it and as gmux treats it."""
    read = strict_http.requests(b"".join(wire for _, wire in done))
    assert len(read) == len(done), "gmux and the target count differently"
    alone = [one for _, wire in done for one in strict_http.requests(wire)]
    assert alone == read, "a request ends elsewhere when another one follows"
    for (request, _), one in zip(done, read, strict=True):
        assert one.method == request.method
    flags = [(r.repeatable, r.close, r.minor_version, r.has_doubtful_body) for r, _ in done]
    return list(zip(read, flags, strict=True))


def check_requests(raw: bytes, pieces: list[bytes]) -> None:
    done, is_refused = carried([raw] if raw else [])
    expected = meaning(done)
    for one in (*by_byte(raw), pieces):
        done, again = carried(one)
        assert meaning(done) == expected
        assert again == is_refused


@settings(max_examples=700)
@given(raw=mutated(requests().map(lambda pair: pair[0]) | st.sampled_from(VALID)), data=st.data())
def test_mutated_requests_mean_the_same_however_they_are_cut(raw, data):
    check_requests(raw, data.draw(cuts(raw)))


# Answers.


def answered(
    asked: bytes, pieces: list[bytes], at_end: bool
) -> tuple[bytes, Part | None, type[BadAnswer] | None, bool]:
    """What goes to the client, the last part, how the answer was refused, and whether bytes are left over."""
    codec = HttpCodec(LIMITS)
    asking, decoder = codec.request_decoder(), codec.answer_decoder()
    asking.receive_data(asked)
    decoder.request = asking.next_event()  # type: ignore[assignment]
    out = b""
    last = None
    try:
        for piece in pieces:
            decoder.receive_data(piece)
            while last is None and (part := decoder.next_event()) is not None:
                out += part.data
                last = part if part.last else None
        if at_end and last is None:
            decoder.receive_eof()
            while last is None and (part := decoder.next_event()) is not None:
                out += part.data
                last = part if part.last else None
    except BadAnswer as error:
        return out, None, type(error), False
    return out, last, None, decoder.has_surplus


def read_answer(asked: bytes, raw: bytes, pieces: list[bytes], at_end: bool) -> object:
    """What the client reads and what becomes of both connections; no answer is one that has no last part."""
    out, last, refused, has_surplus = answered(asked, pieces, at_end)
    if last is None:
        return refused
    method = asked.split(b" ")[0]
    read = strict_http.answers(out, [method])
    assert [one.is_interim for one in read] == [True] * (len(read) - 1) + [False]
    assert read[-1].is_last == last.close
    if asked is GET_10:
        assert len(read) == 1 and not read[0].values(b"transfer-encoding")
    return read, last.close, last.reusable, has_surplus


@settings(max_examples=700)
@given(
    raw=mutated(answers().map(lambda triple: triple[0])),
    asked=st.sampled_from([GET, GET, HEAD, POST, GET_10]),
    at_end=st.booleans(),
    data=st.data(),
)
def test_mutated_answers_mean_the_same_however_they_are_cut(raw, asked, at_end, data):
    whole = read_answer(asked, raw, list(*in_one(raw)), at_end)
    for pieces in (*by_byte(raw), data.draw(cuts(raw))):
        assert read_answer(asked, raw, pieces, at_end) == whole
