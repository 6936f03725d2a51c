"""Isolation over HTTP, all at once: clients of all manners, a target with all faults, one small pool between them.

Each request carries a token of its own, in its path, a field and its body; each answer carries the token of the
request that it answers. The plan of a run, and so every fault and every abort, is drawn from a seed before it begins.
Both ends read what gmux sends with the strict reader.

One case is beyond gmux (docs/design.md): a second answer that comes when the next request is out already. So what the
target sends unasked leaves with the answer before it, in one piece, or on a connection that gmux is to end anyway.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import gevent
import pytest

from tests.support.clients import Client
from tests.support.framing import Framing
from tests.support.service import Service, serving
from tests.support.stream import Closed
from tests.support.strict_http import Answer, NotStrict, Request, read_answer, read_request
from tests.support.target import Connection, Step, Target, close, pause, reset, send

#: Set GMUX_TEST_SEED to repeat a failed run; it is printed. How greenlets interleave is the machine's, not the seed's.
SEED = int(os.environ.get("GMUX_TEST_SEED") or random.randrange(1 << 32))

CLIENTS = 50
BATCHES = 3

#: Seconds of a silent target, of an answer that comes after that, and of one request from its end to its answer's.
TIMEOUT = 0.1
TOO_LATE = 0.15
SETTINGS = {"timeout": "100ms", "queue_timeout": "4s", "connect_timeout": "1s"}
BOUND = 4 + 1 + 2 * TIMEOUT + 1

#: RFC 9110 section 9.2.2.
IDEMPOTENT = {b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE"}

#: What gmux takes as one piece (docs/protocols.md); the rest is never sent again.
WHOLE = 64 * 1024

#: Bytes that leave the target's kernel in one piece, so that no request comes between an answer and what is behind it.
ONE_PIECE = 8 * 1024

EVIL = b"HTTP/1.1 200 OK\r\nX-Token: evil\r\nContent-Length: 4\r\n\r\nevil"
HINTS = b"HTTP/1.1 103 Early Hints\r\nX-Token: %b\r\n\r\n"

#: Answers as they should be; those of BODYLESS have no body, whoever asks.
BODYLESS = {"204": b"204 No Content", "304": b"304 Not Modified"}
SHAPES = ["length"] * 4 + ["chunked"] * 2 + ["until close", "HTTP/1.0", "last", *BODYLESS]

ANSWERED, CUT, REFUSED, SILENT = "answered", "cut", "502", "504"

#: What the target does with a request, and how the request may end.
FAULTS = {
    "none": {ANSWERED},
    "late": {ANSWERED},
    "in pieces": {ANSWERED},
    "hints": {ANSWERED},
    "close behind": {ANSWERED},
    "second answer": {ANSWERED},
    "garbage behind": {ANSWERED},
    "body behind": {ANSWERED},
    "body later": {ANSWERED},
    "second answer later": {ANSWERED},
    "never": {SILENT},
    # In a busy loop the target's timer may be early.
    "after timeout": {SILENT, ANSWERED},
    "close before": {REFUSED},
    "reset before": {REFUSED},
    "close behind 100": {REFUSED},
    "close in head": {REFUSED},
    "close in body": {CUT},
    # A reset may overtake what was sent before it.
    "reset in body": {CUT, REFUSED},
    "garbage": {REFUSED},
}
#: What may be to gmux a connection that ended without a byte of the answer: an idempotent request may go once more.
#: 100 is answered by gmux itself, so that of the target is dropped.
REPEATED = {"close before", "reset before", "reset in body"}


@dataclass
class Ask:
    """A request, how it is sent, and how it is answered the first time that the target gets it."""

    token: bytes
    method: bytes
    minor: int
    closes: bool
    body: bytes
    is_chunked: bool
    expects: bool
    shape: str
    fault: str
    size: int
    dice: random.Random
    attempts: list[tuple[Connection, int]] = field(default_factory=list)

    @property
    def has_doubtful_body(self) -> bool:
        """A target that does not read it may take it for a request, so gmux ends the connection."""
        return bool(self.body) and self.method in (b"GET", b"OPTIONS", b"DELETE")

    @property
    def is_repeatable(self) -> bool:
        """Whether gmux may send it twice, as far as this end can tell: in which pieces it was read is not known."""
        is_whole = not self.is_chunked and not self.expects and len(self.body) <= WHOLE
        return self.method in IDEMPOTENT and is_whole

    def wire(self) -> tuple[bytes, bytes]:
        """Head and body."""
        lines = [
            b"%b /%b HTTP/1.%d" % (self.method, self.token, self.minor),
            b"Host: " + self.token,
            b"X-Token: " + self.token,
        ]
        if self.closes and self.minor:
            lines.append(b"Connection: close")
        elif not self.closes and not self.minor:
            lines.append(b"Connection: keep-alive")
        if self.expects:
            lines.append(b"Expect: 100-continue")
        body = self.body
        if self.is_chunked:
            lines.append(b"Transfer-Encoding: chunked")
            body = as_chunks(body, self.dice)
        elif body or self.method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join([*lines, b"\r\n"]), body

    def is_asked_by(self, request: Request) -> bool:
        """Whether the target got it as it was sent."""
        return (
            (request.method, request.target, request.body) == (self.method, b"/" + self.token, self.body)
            and request.values(b"host") == request.values(b"x-token") == [self.token]
            and not request.trailers
            and not request.values(b"expect")
        )

    # The answer.

    @property
    def has_answer_body(self) -> bool:
        return self.method != b"HEAD" and self.shape not in BODYLESS

    @property
    def answer_body(self) -> bytes:
        return filled(b"answer to " + self.token, self.size) if self.has_answer_body else b""

    def answer(self) -> bytes:
        status = BODYLESS.get(self.shape, b"200 OK")
        version = b"HTTP/1.0" if self.shape == "HTTP/1.0" else b"HTTP/1.1"
        lines = [version + b" " + status, b"X-Token: " + self.token]
        body = self.answer_body
        if self.shape == "chunked":
            lines.append(b"Transfer-Encoding: chunked")
            if self.has_answer_body:
                body = as_chunks(body, self.dice)
        elif self.shape in ("length", "HTTP/1.0", "last", "304") or self.fault == "body later":
            lines.append(b"Content-Length: %d" % self.size)
        if self.shape == "last":
            lines.append(b"Connection: close")
        return b"\r\n".join([*lines, b"\r\n"]) + body

    def is_answered_by(self, answer: Answer) -> bool:
        status = int(BODYLESS.get(self.shape, b"200")[:3])
        return (
            (answer.status, answer.body) == (status, self.answer_body)
            and answer.values(b"x-token") == [self.token]
            and not answer.trailers
        )

    def steps(self, is_first: bool) -> list[Step]:
        """What the target does."""
        data, fault = self.answer(), self.fault if is_first else "none"
        ends: list[Step] = [close] if self.shape in ("until close", "HTTP/1.0", "last") else []
        in_body = data.find(b"\r\n\r\n") + 4 + self.size // 2
        cut = self.dice.randrange(1, len(data))
        steps: dict[str, list[Step]] = {
            "none": [send(data), *ends],
            "late": [pause(0.005), send(data), *ends],
            "in pieces": [send(data[:cut]), pause(0), send(data[cut:]), *ends],
            "hints": [send(HINTS % self.token), pause(0), send(HINTS % self.token + data), *ends],
            "close behind": [send(data), close],
            "second answer": [send(data + EVIL)],
            "garbage behind": [send(data + b"garbage")],
            "body behind": [send(data + b"garbage".ljust(self.size, b"."))],
            "body later": [send(data), pause(0.002), send(b"x" * self.size)],
            "second answer later": [send(data), pause(0.002), send(EVIL)],
            "never": [],
            "after timeout": [pause(TOO_LATE), send(data)],
            "close before": [close],
            "reset before": [reset],
            "close behind 100": [send(b"HTTP/1.1 100 Continue\r\n\r\n"), close],
            "close in head": [send(data[: self.dice.randrange(1, data.find(b"\r\n\r\n"))]), close],
            "garbage": [send(b"\0garbage\r\n\r\n" + EVIL)],
            "close in body": [send(data[:in_body]), close],
            "reset in body": [send(data[:in_body]), reset],
        }
        return steps[fault]

    def may_end_in(self) -> set[str]:
        allowed = set(FAULTS[self.fault])
        if not self.attempts:
            # Lost on a connection that the target closed without a word, which is not to be repeated.
            allowed |= {REFUSED}
        if self.fault in REPEATED and self.is_repeatable:
            allowed |= {ANSWERED, REFUSED}
        return allowed


@dataclass
class Batch:
    """Requests that a client sends at once; `abort` says where it goes away, and how."""

    asks: list[Ask]
    abort: str = ""
    how: str = ""
    is_slow: bool = False


def filled(text: bytes, size: int) -> bytes:
    """`size` bytes that name their message wherever they are cut."""
    return ((text + b" ") * (size // (len(text) + 1) + 1))[:size]


def as_chunks(data: bytes, dice: random.Random) -> bytes:
    chunks = b""
    while data:
        size = dice.randint(1, max(1, len(data) // dice.randint(1, 8)))
        chunks += b"%x\r\n%b\r\n" % (size, data[:size])
        data = data[size:]
    return chunks + b"0\r\n\r\n"


def a_size(dice: random.Random, is_small: bool) -> int:
    sizes = [0, 0, dice.randint(1, 200), dice.randint(1, 4096)]
    if not is_small:
        sizes += [dice.randint(1, 70_000), dice.randint(60_000, 200_000)] if dice.random() < 0.5 else [WHOLE]
    return dice.choice(sizes)


def planned(dice: random.Random, number: int) -> list[Batch]:
    """What a client does, one batch after the other."""
    batches = []
    for at in range(BATCHES):
        count = dice.choice((1, 1, 1, 2, 4))
        abort = dice.choice(("in request", "behind request", "in answer")) if dice.random() < 0.12 else ""
        asks = [an_ask(dice, b"c%d.%d.%d" % (number, at, n), count, n == count - 1, abort) for n in range(count)]
        batches.append(Batch(asks, abort, dice.choice(("fin", "reset")), dice.random() < 0.1))
    return batches


def an_ask(dice: random.Random, token: bytes, count: int, is_last: bool, abort: str) -> Ask:
    method = dice.choice((b"GET", b"GET", b"HEAD", b"POST", b"POST", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"))
    minor = 0 if dice.random() < 0.15 else 1
    may_have_body = method in (b"POST", b"PUT", b"PATCH") or (method != b"HEAD" and dice.random() < 0.15)
    # One that goes away in the middle reads no answers: gmux must be able to take all that it has sent.
    body = filled(token, a_size(dice, is_small=count > 1 and abort != "")) if may_have_body else b""
    shape = dice.choice(SHAPES)
    ask = Ask(
        token,
        method,
        minor,
        # Behind a last request others would be lost, as they should.
        closes=is_last and dice.random() < (0.5 if not minor else 0.15),
        body=body,
        is_chunked=bool(minor and body and dice.random() < 0.4),
        expects=bool(minor and body and count == 1 and not abort and dice.random() < 0.1),
        shape=shape,
        fault="none",
        size=a_size(dice, is_small=False),
        dice=random.Random(dice.random()),
    )
    if dice.random() < 0.35:
        ask.fault = dice.choice(list(FAULTS))
        if ask.fault in ("second answer", "garbage behind"):
            ask.size %= ONE_PIECE
            if shape == "until close":
                ask.shape = "length"
        elif ask.fault == "body behind":
            ask.size %= ONE_PIECE
            ask.shape = dice.choice(list(BODYLESS))
        elif ask.fault == "body later":
            ask.shape, ask.size = "204", max(1, ask.size)
        elif ask.fault == "second answer later" and not (ask.has_doubtful_body and shape != "until close"):
            ask.fault = "none"
        elif ask.fault in ("close in body", "reset in body"):
            ask.shape, ask.size = "length", max(2, ask.size)
            if not ask.has_answer_body:
                ask.fault = "close in head"
        elif ask.fault == "after timeout":
            ask.size %= ONE_PIECE
        elif ask.fault == "close behind" and shape == "until close":
            ask.fault = "none"
    return ask


class FaultyTarget(Target):
    """Does with each request what the plan says, and writes down in `wrong` what it should not have got."""

    def __init__(self, asks: dict[bytes, Ask]) -> None:
        super().__init__(self._behave, Framing("http", self._read, lambda text: text, lambda message: message))
        self.asks = asks
        self.wrong: list[str] = []

    def _read(self, stream: Any) -> Any:
        try:
            return read_request(stream)
        except NotStrict as error:
            self.wrong.append(f"not strict: {error}; {stream._held[:200]!r} is left")
            raise Closed from None

    def _behave(self, connection: Connection, request: Any) -> list[Step]:
        ask = self.asks.get(request.target[1:])
        if ask is None or not ask.is_asked_by(request):
            self.wrong.append(f"nobody sent {request!r:.400}; {ask!r:.400}")
            return [close]
        ask.attempts.append((connection, len(connection.requests)))
        return ask.steps(is_first=len(ask.attempts) == 1)


class Peer(Client):
    """A client that reads as slowly as it is told."""

    pause = 0.0

    def _more(self) -> None:
        if self.pause:
            gevent.sleep(self.pause)
        super()._more()


class Run:
    """One plan, carried out; `outcomes` tells how each request ended whose client waited for it."""

    def __init__(self, seed: str) -> None:
        self.plan = [planned(random.Random(f"{seed} {number}"), number) for number in range(CLIENTS)]
        self.asks = {ask.token: ask for batches in self.plan for batch in batches for ask in batch.asks}
        self.outcomes: dict[bytes, str] = {}

    def use(self, service: Service, number: int) -> None:
        client = None
        try:
            for batch in self.plan[number]:
                if client is None:
                    client = Peer(service.address, receive_buffer=4096 if batch.is_slow else 0)
                client.pause = 0.002 if batch.is_slow else 0.0
                if not self._converse(client, batch):
                    client.sock.close()
                    client = None
        finally:
            if client is not None:
                client.sock.close()

    def _converse(self, client: Peer, batch: Batch) -> bool:
        """Whether the connection goes on."""
        asks, last = batch.asks, batch.asks[-1]
        wires = [b"".join(ask.wire()) for ask in asks]
        if batch.abort in ("in request", "behind request"):
            if batch.abort == "in request":
                wires[-1] = wires[-1][: last.dice.randrange(len(wires[-1]))]
            client.send_raw(b"".join(wires))
            client.vanish(batch.how)
            return False
        if last.expects:
            head, body = last.wire()
            client.send_raw(head)
            assert read_answer(client, last.method).status == 100
            wires = [body]
        # Beside the reading: gmux reads no request while its client takes no answer.
        sending = gevent.spawn(self._send, client, b"".join(wires))
        try:
            if batch.abort:
                client.exactly(1)
                client.vanish(batch.how)
                return False
            for ask in asks:
                begin = monotonic()
                goes_on = self._receive(client, ask)
                assert monotonic() - begin < BOUND, f"{ask.token!r} took too long"
                if not goes_on:
                    return False
            sending.get()
            return True
        except Closed as end:
            if not end.is_reset:
                # Only the reset tells the client that what it has is not the whole answer.
                raise AssertionError(f"the answer to {ask.token!r} ended in good order, and is not whole") from None
            self.outcomes[ask.token] = CUT
            return False
        finally:
            sending.kill()

    def _send(self, client: Peer, data: bytes) -> None:
        with suppress(Closed):
            client.send_raw(data)

    def _receive(self, client: Peer, ask: Ask) -> bool:
        """Take the answer to `ask`, which must be its own or a refusal; whether the connection goes on."""
        while (answer := read_answer(client, ask.method)).is_interim:
            assert ask.minor, "HTTP/1.0 has no interim answers"
            assert answer.values(b"x-token") == [ask.token]
        if answer.values(b"server") == [b"gmux"]:
            assert answer.status in (502, 503, 504)
            assert answer.body.startswith(b"gmux: ") or ask.method == b"HEAD"
            self.outcomes[ask.token] = str(answer.status)
        else:
            assert ask.is_answered_by(answer), f"{ask!r:.400} got {answer!r:.400}"
            self.outcomes[ask.token] = ANSWERED
        assert ask.minor or not answer.values(b"transfer-encoding")
        # Only HTTP/1.0 has answers that end with the connection, and then the connection has ended.
        assert answer.is_last == ask.closes or (answer.is_last and not ask.minor)
        if answer.is_last:
            client.receive_end()
        return not answer.is_last

    def check(self) -> Counter[str]:
        """Fail unless each request ended as its plan allows; how many ended how."""
        ended: Counter[str] = Counter()
        for ask in self.asks.values():
            assert len(ask.attempts) <= 1 or self._may_be_repeated(ask), f"sent more than once: {ask!r:.600}"
            outcome = self.outcomes.get(ask.token, "")
            if outcome and outcome not in ask.may_end_in():
                # A busy machine is a target that is late.
                assert outcome in ("503", SILENT, CUT), f"ended in {outcome}: {ask!r:.600}"
                outcome = "slow"
            ended[outcome] += 1
        for batches in self.plan:
            for batch in batches:
                assert batch.abort != "in request" or not batch.asks[-1].attempts, "a part of a request was sent"
        return ended

    def _may_be_repeated(self, ask: Ask) -> bool:
        """Once, if it is safe, and the used connection ended without a byte of the answer."""
        (first, place), (second, _) = ask.attempts
        return ask.is_repeatable and ask.fault in REPEATED and place > 1 and first is not second


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_answer_belongs_to_its_request_whatever_clients_and_target_do(size, number):
    print(f"GMUX_TEST_SEED={SEED}")
    run = Run(f"{SEED} {size} {number}")
    with FaultyTarget(run.asks) as target:
        with serving(target, pool_size=str(size), **SETTINGS) as service:
            users = [gevent.spawn(run.use, service, number) for number in range(CLIENTS)]
            gevent.joinall(users, raise_error=True)
        assert target.wrong == []
        assert target.peak <= size
    ended = run.check()
    print(dict(ended))
    # Else the test tests nothing.
    assert ended[ANSWERED] > len(run.asks) / 3
    assert ended["slow"] < len(run.asks) / 4
