"""The heads of HTTP/1 messages: parsed by gunicorn_h1c, checked by the rules below, and written anew by gmux.

What the parser lets through and an attacker could use to make gmux and the target disagree is refused here: bare LF
or CR and folded lines (RFC 9112 sections 2.2 and 5.2), doubtful lengths (section 6.3), a doubtful Host (section 3.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Container
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import gunicorn_h1c

from gmux.codecs import _http_authentication
from gmux.codecs._buffer import Buffer
from gmux.errors import FramingError, HeadTooLarge, TargetNameTooLong, Unsupported, VersionUnsupported

END = b"\r\n\r\n"

#: Behind the last of the lines that are joined by CRLF, this makes END.
END_LINES = b"\r\n"

#: What clients of HTTP/2 begin with, made so that servers of HTTP/1 refuse it (RFC 9113 section 3.4).
PREFACE = b"PRI * HTTP/2.0\r\n"

MAX_REQUEST_LINE = 8 * 1024
MAX_FIELDS = 100

#: Bytes of an answer's head up to which what it means is remembered.
MAX_REMEMBERED = 1024

#: Fields for one connection only (RFC 9110 section 7.6.1), and those that say where a body ends: gmux states its own.
#: `Expect` is gmux's to answer, because it takes the body before it checks a connection out.
OURS = frozenset(
    b"connection keep-alive proxy-connection te upgrade http2-settings expect"
    b" content-length transfer-encoding host content_length transfer_encoding".split()
)

_CREDENTIALS = frozenset((b"authorization", b"proxy-authorization"))
_CHALLENGES = frozenset((b"www-authenticate", b"proxy-authenticate"))

#: The names that are looked at, in requests and in answers, where Host says nothing.
SEEN_IN_REQUESTS = OURS | _CREDENTIALS
SEEN_IN_ANSWERS = OURS - {b"host"} | _CHALLENGES

_LOOK_ALIKES = frozenset((b"content_length", b"transfer_encoding"))

#: A Connection field may not take these from a message.
_NEVER_NOMINATED = frozenset((b"host", b"content-length", b"transfer-encoding", b"close", b"keep-alive"))

_HOST = re.compile(rb"(?:(?:[A-Za-z0-9._~!$&'()*+;=-]|%[0-9A-Fa-f]{2})+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:http)://([^/?#]*)([/?][!-\"$-~]*)?")
_TOKEN = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]")
_REQUEST_LINE = re.compile(rb"[^ ]+ [^ ]+ HTTP/[0-9]\.[0-9]\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [0-9]{3}(?: [^\r\n]*)?\r\n")

#: Seconds that a target keeps an idle connection, and the requests that it still takes on it.
_KEEP_ALIVE = re.compile(rb"(?:^|[,\t ])(timeout|max)=([0-9]{1,9})(?=[,\t ]|$)", re.IGNORECASE)

Fields = list[tuple[bytes, bytes]]


@dataclass(slots=True)
class Framing:
    """What a head's own fields say; None: the field is not there. `options` are those of Connection.

    `schemes` are of those that authenticate a connection: in a request those of credentials, in an answer those of
    challenges that carry a token.
    """

    length: int | None = None
    is_chunked: bool = False
    options: frozenset[bytes] = frozenset()
    host: bytes | None = None
    expectation: bytes | None = None
    keep_alive: bytes | None = None
    takes_trailers: bool = False
    schemes: frozenset[bytes] = frozenset()


@lru_cache(maxsize=256)
def is_host(value: bytes) -> bool:
    """Whether `value` is a host with or without a port, or empty (RFC 9110 section 7.2); clients name the same few."""
    return not value or _HOST.fullmatch(value) is not None


def take(buffer: Buffer, max_head: int) -> bytes | None:
    """Take a whole head off the buffer. Raises HeadTooLarge, TargetNameTooLong, FramingError."""
    head = buffer.take_through(END)
    if len(buffer if head is None else head) > max_head:
        if head is not None:
            buffer.put_back(head)
        if b"\r\n" not in buffer.peek(max_head):
            raise TargetNameTooLong(f"a request line is longer than {max_head} bytes")
        raise HeadTooLarge(f"a head is longer than {max_head} bytes")
    if head is None:
        held = buffer.peek(max_head)
        if b"\n\n" in held or b"\n\r\n" in held:
            # Whoever ends a head so waits for an answer, and would wait until the request times out.
            raise FramingError("a line in a head ends in a bare LF")
    return head


def check_beginning(data: bytes) -> None:
    """Refuse at once what cannot become a request, as from a client that speaks another protocol. Raises FramingError.

    It would wait for its end until the request times out, and be told the wrong reason.
    """
    if data[:1] == b"\x16":
        raise FramingError("the client speaks TLS; https is not offered")
    line, end, _ = data.partition(b"\n")
    # Nothing, or half an empty line, is what may be left of the empty lines that are ignored.
    if data not in (b"", b"\r") and (not _TOKEN.match(data) or (end and not _REQUEST_LINE.match(line + end))):
        raise FramingError("what came does not begin as a request")


def check_lines(head: bytes) -> None:
    """Refuse what the parser lets through. Raises FramingError.

    A head that is the same, byte for byte, as what gmux writes of it has nothing to refuse and can do without.
    """
    lines = head.count(b"\r\n")
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise FramingError("a line in a head ends in a bare LF or has a bare CR in it")
    if b"\n " in head or b"\n\t" in head:
        raise FramingError("a line in a head is folded")
    # RFC 9112 section 3: the parts of a request line are divided by one blank. Few heads have two in a row at all.
    if b"  " in head and head[:5] != b"HTTP/" and not _REQUEST_LINE.match(head):
        raise FramingError("the request line has blanks to spare")


def parse_request(head: bytes) -> gunicorn_h1c.HttpRequest:
    """Raises FramingError and its kinds."""
    try:
        # By position, which is faster: bytes parsed before, and the limits of line, number of fields and one field.
        return gunicorn_h1c.parse_request_fast(head, 0, MAX_REQUEST_LINE, MAX_FIELDS, len(head))
    except gunicorn_h1c.LimitRequestLine:
        raise TargetNameTooLong(f"a request line is longer than {MAX_REQUEST_LINE} bytes") from None
    except gunicorn_h1c.LimitRequestHeaders as error:
        raise HeadTooLarge(str(error)) from None
    except gunicorn_h1c.InvalidHTTPVersion as error:
        if _REQUEST_LINE.match(head) and not head.startswith(PREFACE):
            raise VersionUnsupported("only HTTP/1.0 and HTTP/1.1 are spoken") from None
        raise FramingError(str(error)) from None
    except Exception as error:
        # All that it can say of a head is a refusal. It has two classes called IncompleteError, and exports the other.
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"transfer-encoding":
                check_codings(value.strip(b"\t "))
        raise FramingError(str(error)) from None


class AnswerHead(NamedTuple):
    """`lines` are the status line and the fields that go on, joined by CRLF.

    `stays` says whether the target keeps its connection, `idle_limit` for how many seconds without a request, and
    `requests_left` how many more it takes there (None: it does not say). `may_pipeline`: also several at a time.

    `plain` is all of it as it goes to an HTTP/1.1 client that stays, and `plain_length` the length of the body, when
    the head is of the common kind: a length, and a connection that stays and is nobody's own. Else the length is -1.
    """

    status: int
    minor_version: int
    framing: Framing
    lines: bytes
    stays: bool
    idle_limit: float
    requests_left: int | None
    may_pipeline: bool
    plain: bytes
    plain_length: int


def parse_answer(has_via: bool, head: bytes) -> AnswerHead:
    """What the head of an answer says; `has_via` asks for a Via of gmux's. Raises FramingError."""
    check_lines(head)
    try:
        parsed = gunicorn_h1c.parse_response(head)
    except Exception as error:  # as above
        raise FramingError(str(error)) from None
    status, minor_version = parsed["status"], parsed["minor_version"]
    if minor_version not in (0, 1) or not 100 <= status <= 999 or not _STATUS_LINE.match(head):
        raise FramingError("the status line is not HTTP/1")
    lines = [b"HTTP/1.1 %d %b" % (status, parsed["message"])]
    framing = read_fields(parsed["headers"], lines, SEEN_IN_ANSWERS)
    if framing.is_chunked and not minor_version:
        raise FramingError("Transfer-Encoding in HTTP/1.0")
    if has_via:
        lines.append(via(minor_version))
    options = framing.options
    idle_limit, requests_left = read_keep_alive(framing.keep_alive or b"")
    stays = b"close" not in options and (minor_version == 1 or b"keep-alive" in options) and idle_limit > 0
    has_usual_end = status >= 200 and status not in (204, 304) and framing.length is not None
    is_plain = has_usual_end and stays and requests_left is None and not framing.schemes
    joined = b"\r\n".join(lines)
    plain_length = framing.length if is_plain and framing.length is not None else -1
    return AnswerHead(
        status,
        minor_version,
        framing,
        joined,
        stays,
        idle_limit,
        requests_left,
        # RFC 9112 section 9.3.2: HTTP/1.1 is persistent unless it says otherwise.
        minor_version == 1 and stays and requests_left is None,
        joined + END,
        plain_length,
    )


def via(minor_version: int) -> bytes:
    """gmux's line for a message that it received in this version (RFC 9110 section 7.6.3)."""
    return b"Via: 1.%d gmux" % minor_version


def read_keep_alive(value: bytes) -> tuple[float, int | None]:
    """The `timeout` in seconds and the `max` of a Keep-Alive field; infinity and None where it does not say.

    A hint of RFC 2068 section 19.7.1.1 that targets still give, so what cannot be read of it is not an error.
    """
    hints = {name.lower(): int(number) for name, number in _KEEP_ALIVE.findall(value)}
    return hints.get(b"timeout", math.inf), hints.get(b"max")


def read_fields(fields: Fields, lines: list[bytes], seen: Container[bytes] = SEEN_IN_REQUESTS) -> Framing:
    """Append to `lines` the fields that go on, in their order; return what the others say.

    `seen` are the names, in small letters, that are not simply passed on. Raises FramingError.
    """
    framing = Framing()
    nominated = False
    for name, value in fields:
        lower = name.lower()
        if lower not in seen:
            lines.append(name + b": " + value)
        elif lower == b"host":
            if framing.host is not None or not is_host(value):
                raise FramingError("Host is repeated or not a host")
            framing.host = value
            lines.append(name + b": " + value)
        elif lower == b"content-length":
            if framing.length is not None or not value.isdigit() or len(value) > 18:
                raise FramingError("Content-Length is repeated or not a number")
            framing.length = int(value)
            lines.append(name + b": %d" % framing.length)
        elif lower == b"transfer-encoding":
            if framing.is_chunked or value.lower() != b"chunked":
                check_codings(value)
                raise FramingError("Transfer-Encoding is repeated or not chunked")
            framing.is_chunked = True
            lines.append(name + b": chunked")
        elif lower == b"connection":
            options = {option.strip(b" \t").lower() for option in split_list(value)}
            framing.options |= options
            nominated = nominated or not options <= _NEVER_NOMINATED
        elif lower in _CREDENTIALS:
            framing.schemes |= _http_authentication.of_credentials(value)
            lines.append(name + b": " + value)
        elif lower in _CHALLENGES:
            framing.schemes |= _http_authentication.of_tokens(value)
            lines.append(name + b": " + value)
        elif lower == b"expect":
            # Two of them are a list, and no list is met.
            framing.expectation = value.lower() if framing.expectation is None else b""
        elif lower == b"keep-alive":
            framing.keep_alive = value
        elif lower == b"te":
            framing.takes_trailers = b"trailers" in [coding.strip(b" \t") for coding in split_list(value.lower())]
        elif lower in _LOOK_ALIKES:
            # To us it says nothing, to a target that has WSGI's or CGI's names for fields it says where the body ends.
            raise FramingError("a name with _ may be taken for the field with -")
    if framing.is_chunked and framing.length is not None:
        raise FramingError("both Content-Length and Transfer-Encoding are given")
    if nominated:
        lines[:] = drop(lines, framing.options - _NEVER_NOMINATED)
    return framing


def split_list(value: bytes) -> list[bytes]:
    """The members of a list, blanks included. Raises HeadTooLarge: thousands of them would hold up all others."""
    if value.count(b",") >= MAX_FIELDS:
        raise HeadTooLarge(f"a list in a field has more than {MAX_FIELDS} members")
    return value.split(b",")


def drop(lines: list[bytes], names: Container[bytes]) -> list[bytes]:
    """`lines` without the fields of these names; the first line is none."""
    return lines[:1] + [line for line in lines[1:] if line.partition(b":")[0].lower() not in names]


def have_credentials(lines: list[bytes]) -> bool:
    """Whether one of `lines`, those that go on, has credentials that authenticate a connection."""
    fields = [line.partition(b":")[::2] for line in lines]
    return any(_http_authentication.of_credentials(value) for name, value in fields if name.lower() in _CREDENTIALS)


def without(lines: bytes, *names: bytes) -> bytes:
    """`drop` for lines that are joined."""
    return b"\r\n".join(drop(lines.split(b"\r\n"), names))


def count_hop(lines: list[bytes]) -> bool:
    """Take one off Max-Forwards, where it is; whether the message may go on (RFC 9110 section 7.6.2).

    Raises FramingError.
    """
    for at, line in enumerate(lines):
        name, _, value = line.partition(b": ")
        if name.lower() == b"max-forwards":
            if not value.isdigit() or len(value) > 9:
                raise FramingError("Max-Forwards is not a number")
            if not int(value):
                return False
            lines[at] = name + b": %d" % (int(value) - 1)
    return True


def check_codings(value: bytes) -> None:
    """Raises Unsupported when only a coding below chunked is the fault of a Transfer-Encoding (RFC 9112 section 6.1).

    All others leave the length of the body in doubt, which is a bad request (section 6.3).
    """
    codings = [coding.strip(b"\t ").lower() for coding in value.split(b",")]
    if len(codings) > 1 and all(codings) and codings[-1] == b"chunked" and b"chunked" not in codings[:-1]:
        raise Unsupported("no transfer coding but chunked is offered")


def split_absolute(method: bytes, path: bytes) -> tuple[bytes, bytes] | None:
    """Authority and origin-form of a request target in absolute-form; None when it is `*`. Raises FramingError."""
    if path == b"*":
        return None  # the parser lets it through for OPTIONS alone
    match = _ABSOLUTE.fullmatch(path)
    if match is None or not match[1] or not is_host(match[1]):
        raise FramingError("the request target is not a path, and not an http URL with a valid host")
    rest = match[2] or (b"*" if method == b"OPTIONS" else b"/")  # RFC 9112 section 3.2.4
    return match[1], rest if rest[:1] != b"?" else b"/" + rest
