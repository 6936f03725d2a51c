"""Whether a target answers HTTP requests that are sent together: what it is asked, and how its answers are judged.

First the target is asked one request at a time, until two are known whose answers can be told apart and leave the
connection open. Then both kinds are sent together, mixed in an order in which a lost, doubled or moved answer shows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from gmux.codecs import _http_head
from gmux.codecs._http_request import HttpRequest
from gmux.codecs.base import Part, Request

USER_AGENT = b"gmux (pipelining test)"

#: The order of the two kinds. Turned or shifted it is another one. At a small depth this holds for each part that is
#: sent together, with few exceptions, which still show a loss. A test tries all depths.
ORDER = (0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 0)

#: Requests that are sent together at most, whatever the depth: about 20 KB.
MAX_TOGETHER = 64

#: The kind that is asked alone afterwards. It differs from the last one in ORDER, so an answer left over shows.
LAST = 1

#: Bytes that make each request differ in length, so that the ends of a target's buffer (512 to 4096 bytes) fall on
#: different places of a request. Together they are more than 4096 bytes; each request alone stays a common one.
PADDING = tuple(40 + at * 269 % 401 for at in range(len(ORDER)))

LOST = "the target failed the test of requests that are sent together"
ALIKE = "the target's answers cannot be told apart, so nothing shows whether it answers requests that are sent together"
ENDING = "the target ends its connection after most answers, so it cannot answer requests that are sent together"
LIMITED = "the target speaks HTTP/1.0, or limits the requests on a connection (Keep-Alive: max)"


class Answer(NamedTuple):
    """`length` is that of the body, in bytes."""

    status: int
    length: int


class Kind(NamedTuple):
    """A request, by its method and its target, and the answer that it gets alone."""

    line: bytes
    answer: Answer


def is_of(answer: Answer, own: Answer, other: Answer) -> bool:
    """Whether `answer` is of the kind that was answered by `own`, and not of the kind that was answered by `other`.

    A page may show a counter, or the request with its padding. Lengths may differ, therefore: the nearer one counts.
    """
    if answer.status != own.status:
        return False
    return own.status != other.status or abs(answer.length - own.length) < abs(answer.length - other.length)


class HttpProbe:
    """A `Probe`. `make` turns the head of a request into a request, as it does for those of clients.

    `token` makes a path that no target has. Up to `depth` requests are sent together.
    """

    def __init__(self, make: Callable[[bytes], HttpRequest], authority: bytes, token: str, depth: int) -> None:
        self.objection = ""
        self._make = make
        # The answer to a path that does not exist is small, mostly, and costs the target the least.
        self._candidates = deque((b"GET /gmux-" + token.encode(), b"HEAD /", b"GET /", b"OPTIONS *"))
        self._fields = b"Host: %b\r\nUser-Agent: %b\r\n" % (authority or b"localhost", USER_AGENT)
        self._known: list[Kind] = []
        # The candidate that is asked alone now, or nothing.
        self._line = b""
        self._pair: tuple[Kind, Kind] | None = None
        # What is sent together, step by step: of each request its kind and its padding.
        mixed = tuple(zip(ORDER, PADDING, strict=True))
        if depth > len(mixed):
            # What was not seen is not relied on. A loss shows in any number of them by the answers that do not come.
            mixed = (mixed * (MAX_TOGETHER // len(mixed)))[:depth]
        self._steps = deque(mixed[at : at + depth] for at in range(0, len(mixed), depth))
        self._steps.append(((LAST, 0),))
        self._due: tuple[tuple[int, int], ...] = ()
        self._answers: list[Answer] = []
        self._status = self._length = 0

    def requests(self) -> list[Request]:
        if self._line:
            self._learn(Kind(self._line, self._answers[0]))
        elif self._pair is not None and self._due:
            self._judge(*self._pair)
        self._reset()
        if self.objection:
            return []
        if self._pair is None:
            self._line = self._candidates.popleft()
            return [self._request(self._line, 0)]
        self._due = self._steps.popleft() if self._steps else ()
        return [self._request(self._pair[kind].line, padding) for kind, padding in self._due]

    def receive(self, part: Part, may_pipeline: bool) -> None:
        if not self._status and part.data:
            self._status = int(part.data[9:12])
            self._length = -(part.data.index(_http_head.END) + len(_http_head.END))
        self._length += len(part.data)
        if not part.last:
            return
        self._answers.append(Answer(self._status, self._length))
        self._status = 0
        if part.reusable and not may_pipeline:
            self.objection = LIMITED

    def fail(self, reason: str) -> None:
        if self._line:
            self._check_candidates()
        elif len(self._due) > 1:
            self.objection = f"{LOST} ({len(self._answers)} of {len(self._due)} answers came: {reason})"
        elif self._due:
            self.objection = f"{LOST} (after them: {reason})"
        self._reset()

    def _reset(self) -> None:
        self._line, self._due, self._answers, self._status = b"", (), [], 0

    def _learn(self, kind: Kind) -> None:
        """A candidate was answered, and its connection is sound."""
        for other in self._known:
            if other.answer != kind.answer:
                self._pair = other, kind
                return
        self._known.append(kind)
        self._check_candidates()

    def _check_candidates(self) -> None:
        """None of those that were asked makes a pair. Is one left?"""
        if not self._candidates:
            self.objection = self.objection or (ALIKE if len(self._known) > 1 else ENDING)

    def _judge(self, *pair: Kind) -> None:
        """All that were sent together were answered: each by its own answer?"""
        for at, ((kind, _), answer) in enumerate(zip(self._due, self._answers, strict=True), 1):
            if not is_of(answer, pair[kind].answer, pair[1 - kind].answer):
                what = f"answer {at} of {len(self._due)}" if len(self._due) > 1 else "the next answer"
                self.objection = f"{LOST} ({what} was that to another request)"
                return

    def _request(self, line: bytes, padding: int) -> HttpRequest:
        pad = b"X-Padding: %b\r\n" % (b"." * padding) if padding else b""
        request = self._make(b"%b HTTP/1.1\r\n%b%b\r\n" % (line, self._fields, pad))
        # Answers in chunks come bare for HTTP/1.0, so that their length is that of the body.
        request.minor_version = 0
        # It says something about one connection; on another it is worth nothing.
        request.repeatable = False
        return request
