"""Many exchanges with targets that misbehave in every way at once: no answer is another's, and the budget holds.

`make soak` runs a million of them, in equal parts over the scenes, and prints what befell them by kind.
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import gevent
import pytest
from gevent import socket

from tests.support.clients import Client
from tests.support.framing import HTTP, ISO8583, LINE, MPU, Framing
from tests.support.ntlm import NtlmClient, authenticating
from tests.support.service import Server
from tests.support.stream import Closed
from tests.support.target import Target
from tests.support.wait import wait_until

EXCHANGES = int(os.environ.get("SOAK_EXCHANGES", "6000"))
SEED = int(os.environ.get("SOAK_SEED", "1"))
CLIENTS = 16
FAULT_SHARE = 0.06
TIMEOUT = 0.15


@dataclass
class Tally:
    """What happened. `faults` are those of the target, `outcomes` those of the clients' requests."""

    dice: random.Random
    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)


# Ways in which a target ends a connection, around an answer that is `data`.


def end_behind(connection: Any, data: bytes) -> None:
    connection.send(data)
    connection.close()


def reset_behind(connection: Any, data: bytes) -> None:
    connection.send(data)
    connection.cut()


def end_before(connection: Any, data: bytes) -> None:
    connection.close()


def reset_before(connection: Any, data: bytes) -> None:
    connection.cut()


def end_within(connection: Any, data: bytes) -> None:
    connection.send(data[: len(data) // 2])
    connection.close()


def linger(connection: Any, data: bytes) -> None:
    """Say FIN, and read on until the other side does, or cuts off."""
    with suppress(OSError):
        connection.send(data)
        connection.sock.shutdown(socket.SHUT_WR)
        connection.target.lingering.add(connection)
        while connection.is_open and connection.sock.recv(65536):
            pass
    connection.target.lingering.discard(connection)
    connection.close()


def say_nothing(connection: Any, data: bytes) -> None:
    """No word more on this connection.

    To leave out one answer and give the next would be another fault, which nobody can see before it is too late where
    several are in flight by order and an answer does not name its request.
    """
    connection.is_mute = True


def is_mute(connection: Any) -> bool:
    return getattr(connection, "is_mute", False)


class SoakTarget(Target):
    """Counts connections in the order of the network: of one that lingers the end may be here, and not be read yet."""

    #: For `authenticating`: no more fields.
    extra = b""

    def __init__(self, behaviour: Any, framing: Framing) -> None:
        super().__init__(behaviour, framing)
        self.lingering: set[Any] = set()

    def _serve(self, sock: Any, address: Any) -> None:
        for connection in list(self.lingering):
            with suppress(BlockingIOError):
                try:
                    while connection.sock._sock.recv(65536, socket.MSG_DONTWAIT):
                        pass
                except ConnectionResetError:
                    pass
                connection.close()
        super()._serve(sock, address)


ENDS = (end_behind, reset_behind, end_before, reset_before, end_within, linger, say_nothing)

Fault = Callable[[Any, bytes], None]


@dataclass(frozen=True)
class Scene:
    """A target, how gmux is set up before it, and what a client does in one exchange."""

    framing: Framing
    settings: Mapping[str, str]
    behave: Callable[[Tally], Any]
    ask: Callable[[Client, bytes, Tally], None]
    client: type[Client] = Client
    pool_size: int = 1
    passes_probes: bool = True


# ISO 8583. Fields 11, 41 and 48, which has the token of the client.

BITMAP = b"0020000000810000"


def message(mti: bytes, number: int, token: bytes) -> bytes:
    return mti + BITMAP + b"%06d%08d%03d%b" % (number, number % 97, len(token), token)


def ask_host(client: Client, token: bytes, tally: Tally) -> None:
    number = tally.dice.randrange(1_000_000)
    mti = tally.dice.choice((b"0100", b"0200", b"0220", b"0420"))
    client.send(message(mti, number, token))
    got = client.receive()
    assert got == message(mti[:2] + b"%d" % (int(mti[2:3]) + 1) + mti[3:], number, token), (token, got)


HOST_FAULTS = ("own", "own, several", "own, with its number", "former", "kind", "own, behind", "ends", "late")


def host(tally: Tally) -> Any:
    """Sends requests and notices of its own, answers again what it has answered, and answers of other kinds."""
    dice = tally.dice
    former: deque[bytes] = deque(maxlen=50)

    def own(number: int) -> bytes:
        return message(dice.choice((b"0800", b"0820", b"0620", b"0200", b"0420", b"0400")), number, b"own")

    def behave(connection: Any, request: bytes) -> tuple[()]:
        if is_mute(connection):
            return ()
        wrap = connection.target.framing.wrap
        asked = connection.target.framing.payload(request)
        number = int(asked[20:26])
        answer = asked[:2] + b"%d" % (int(asked[2:3]) + 1) + asked[3:]
        data = wrap(answer)
        if dice.random() < FAULT_SHARE:
            kind = dice.choice(
                ("own", "own, several", "own, with its number", "former", "kind", "own, behind", "ends", "late")
            )
            if kind == "own":
                data = wrap(own(dice.randrange(1_000_000))) + data
            elif kind == "own, several":
                data = b"".join(wrap(own(dice.randrange(1_000_000))) for _ in range(5)) + data
            elif kind == "own, with its number":
                data = wrap(own(number)) + data
            elif kind == "former" and former:
                data = wrap(dice.choice(former)) + data
            elif kind == "kind":
                data = wrap(message(dice.choice((b"0810", b"0510")), number, b"kind")) + data
            elif kind == "own, behind":
                data += wrap(own(number))
            elif kind == "late":
                gevent.spawn_later(TIMEOUT + 0.05, send_late, connection, data)
                data = b""
            elif kind == "ends":
                end = dice.choice(ENDS)
                tally.faults[end.__name__] += 1
                end(connection, data)
                return ()
            tally.faults[kind] += 1
        former.append(answer)
        if data:
            connection.send(data)
        return ()

    return behave


def send_late(connection: Any, data: bytes) -> None:
    with suppress(Closed):
        if connection.is_open:
            connection.send(data)


# HTTP and lines: what a target may do to them.


def get_page(client: Client, token: bytes, tally: Tally) -> None:
    client.send_raw(b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % token)
    got = HTTP.read(client)
    if got.startswith(b"HTTP/1.1 200 "):
        assert HTTP.payload(got) == token, (token, got)
    else:
        tally.outcomes[got[9:12].decode()] += 1


def ask_line(client: Client, token: bytes, tally: Tally) -> None:
    assert client.ask(token) == token


def ender(tally: Tally) -> Any:
    """Answers, and ends connections in all ways."""

    def behave(connection: Any, request: bytes) -> tuple[()]:
        data = connection.target.framing.answer(request)
        if is_mute(connection):
            return ()
        if tally.dice.random() < FAULT_SHARE / 2:
            end = tally.dice.choice(ENDS)
            tally.faults[end.__name__] += 1
            end(connection, data)
        elif tally.dice.random() < FAULT_SHARE / 4 and data.startswith(b"HTTP"):
            tally.faults["Connection: close"] += 1
            connection.send(data.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            connection.close()
        else:
            connection.send(data)
        return ()

    return behave


def thrower(tally: Tally) -> Any:
    """Answers the first request of what came together, and throws the rest away; and ends connections, too."""
    end = ender(tally)

    def behave(connection: Any, request: bytes) -> Any:
        if connection._held:
            tally.faults["thrown away"] += connection._held.count(b"\r\n\r\n")
            connection._held = b""
        return end(connection, request)

    return behave


# Connections that belong to somebody.


class Visitor(NtlmClient):
    """Half of them have a name, under which they sign on before their first request on each connection to gmux."""

    count = 0

    def __init__(self, address: Any, framing: Framing) -> None:
        Visitor.count += 1
        super().__init__(address, b"user%d" % Visitor.count if Visitor.count % 2 else b"")


def visit(client: Client, token: bytes, tally: Tally) -> None:
    assert isinstance(client, Visitor)
    if client.name and tally.dice.random() < 0.2:
        client.put(b"", b"NTLM TlRMTVNTUAABAAAAAYIAAAAAAAAAAAAAAAAAAAAAAAA=")
        HTTP.read(client)
        status, body = client.finish(token)
    else:
        status, body = client.get(token)
    if status == 200:
        user, _, path = body.partition(b" ")
        assert path == token, (token, body)
        assert user in (b"nobody", client.name), (client.name, body)
        tally.outcomes["as " + ("nobody" if user == b"nobody" else "a user")] += 1
    else:
        tally.outcomes[str(status)] += 1


def intranet(tally: Tally) -> Any:
    """Authenticates connections, and ends some."""

    def behave(connection: Any, request: bytes) -> Any:
        steps = authenticating(connection, request)
        if is_mute(connection):
            return ()
        if tally.dice.random() < FAULT_SHARE / 4:
            end = tally.dice.choice((end_before, reset_before, say_nothing))
            tally.faults[end.__name__] += 1
            end(connection, b"")
            return ()
        return steps

    return behave


SCENES = {
    "iso8583 strict": Scene(ISO8583, {}, host, ask_host),
    "iso8583 strict, by its spec": Scene(ISO8583, {"spec": "ascii"}, host, ask_host, pool_size=3),
    "mpu strict": Scene(MPU, {}, host, ask_host),
    "iso8583 by order": Scene(ISO8583, {"pipeline": "8", "correlation": "order"}, host, ask_host, pool_size=2),
    "iso8583 by key": Scene(ISO8583, {"pipeline": "16"}, host, ask_host, pool_size=2),
    "echo strict": Scene(LINE, {}, ender, ask_line),
    "echo by order": Scene(LINE, {"pipeline": "8"}, ender, ask_line, pool_size=2),
    "http strict": Scene(HTTP, {}, ender, get_page, pool_size=2),
    "http pipelined": Scene(HTTP, {"pipeline": "8"}, ender, get_page, pool_size=2),
    "http, pipelines badly": Scene(HTTP, {"pipeline": "8"}, thrower, get_page, passes_probes=False),
    "http, binds": Scene(HTTP, {"private_timeout": "20ms"}, intranet, visit, Visitor, pool_size=3),
    "http pipelined, binds": Scene(HTTP, {"pipeline": "4", "private_timeout": "20ms"}, intranet, visit, Visitor, 3),
}


def listed(counter: Counter[str]) -> str:
    return ", ".join(f"{number:,} {what}" for what, number in sorted(counter.items()))


@pytest.mark.timeout(max(120, EXCHANGES // 50))
@pytest.mark.parametrize("name", SCENES)
def test_no_answer_is_another_ones_and_no_connection_one_too_many(name):
    scene = SCENES[name]
    tally = Tally(random.Random(f"{SEED} {name}"))
    target = SoakTarget(scene.behave(tally), scene.framing)
    target.passes_probes = scene.passes_probes
    settings = {
        "pool_size": str(scene.pool_size),
        "timeout": f"{TIMEOUT}s",
        "queue_timeout": "5s",
        "log_level": "error",
    }
    settings |= {"late_window": "1s"} if name == "iso8583 by key" else {}
    left = EXCHANGES // len(SCENES)

    def run(number: int, address: Any) -> None:
        nonlocal left
        while left > 0:
            with suppress(Closed), scene.client(address, scene.framing) as client:
                while left > 0:
                    left -= 1
                    try:
                        scene.ask(client, b"c%d.%d" % (number, left), tally)
                    except Closed:
                        tally.outcomes["closed"] += 1
                        raise
                    tally.outcomes["answered"] += 1
                    if left % 997 == 0:
                        break  # a client that leaves
        tally.outcomes["clients"] += 1

    with target, Server(target, **settings | dict(scene.settings)) as server:
        jobs = [gevent.spawn(run, number, server.address) for number in range(CLIENTS)]
        gevent.joinall(jobs, raise_error=True)
        target.behaviour = ()
        wait_until(lambda: target.open <= scene.pool_size)
        faults, outcomes = (
            ", ".join(f"{n} {what}" for what, n in sorted(c.items())) for c in (tally.faults, tally.outcomes)
        )
        print(f"{name}: {outcomes}; connections {target.accepted}, peak {target.peak} of {scene.pool_size}; {faults}")
        assert tally.outcomes["clients"] == CLIENTS
        assert tally.outcomes["answered"] >= 0.7 * (EXCHANGES // len(SCENES))
        assert target.peak <= scene.pool_size
