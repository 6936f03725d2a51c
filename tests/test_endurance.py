"""Every attack at once, each at a moderate rate, on one service: nothing of it grows, and each good request ends well.

`make soak SOAK_MINUTES=20` runs it. Of memory, descriptors, greenlets and files the last quarter is compared with the
first one after a warm-up.
"""

from __future__ import annotations

import os
from collections import Counter
from contextlib import ExitStack, suppress
from itertools import count
from pathlib import Path
from statistics import median
from time import monotonic

import gevent
import pytest

from gmux.net import Address
from loadtest.protocols import PROTOCOLS, BadAnswer, WrongAnswer
from tests.support.attacks import ATTACKS
from tests.support.clients import Client
from tests.support.closed_loop import allow_descriptors
from tests.support.framing import HTTP
from tests.support.hostile import Attackers, attacked_route, good_target, route, service
from tests.support.stream import Closed
from tests.support.target import closed_port

SECONDS = 60 * float(os.environ.get("SOAK_MINUTES") or 0)
WARMUP = 0.2
SAMPLES = 200

#: Of the limit of each attack; all together have that of one of them.
RATE = 1 / len(ATTACKS)
CLIENTS = 8

#: What the median of the last quarter may have more than that of the first.
ALLOWED = {"KiB of memory": 4096, "descriptors": 30, "greenlets": 30, "files": 2}

pytestmark = [
    pytest.mark.skipif(not SECONDS, reason="takes minutes: make soak SOAK_MINUTES=20"),
    pytest.mark.timeout(SECONDS + 180),
]


class Clients:
    """Each has a connection, and asks a moment after each answer until all is over."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.is_over = False
        self._numbers = count()

    def run(self, address: Address, is_attacked: bool) -> None:
        """Where others attack the same route, gmux may refuse or close; nowhere may a request have no end."""
        protocol = PROTOCOLS["http"]
        while not self.is_over:
            with suppress(*(Closed, OSError) if is_attacked else ()), Client(address, HTTP) as client:
                while not self.is_over:
                    request = protocol.request(0, next(self._numbers))
                    try:
                        client.send_raw(request)
                        protocol.check(request, HTTP.read(client))
                        self.outcomes["answered"] += 1
                    except WrongAnswer:
                        raise
                    except (BadAnswer, Closed) as error:
                        if not is_attacked:
                            raise
                        self.outcomes[f"attacked: {error}"] += 1
                        raise Closed from error
                    gevent.sleep(0.02)


def sample(worker: int, folder: Path) -> dict[str, int]:
    status = Path(f"/proc/{worker}/status").read_text()
    return {
        "KiB of memory": int(status.partition("VmRSS:")[2].split()[0]),
        "descriptors": len(os.listdir(f"/proc/{worker}/fd")),
        "greenlets": int((folder / "greenlets").read_text() or 0),
        "files": sum(len(files) for _, _, files in os.walk(folder)),
    }


def test_all_attacks_at_once_nothing_grows_and_every_request_ends(tmp_path):
    allow_descriptors()
    temporary, other = tmp_path / "temporary", closed_port()
    temporary.mkdir()
    (tmp_path / "greenlets").write_text("0")
    environment = {"TMPDIR": str(temporary), "GREENLETS": str(tmp_path / "greenlets")}
    environment["GREENLETS_EVERY"] = str(max(1.0, SECONDS / SAMPLES))
    good, clients = Clients(), []
    with ExitStack() as stack:
        routes = {
            other: route(other, stack.enter_context(good_target(tmp_path, "other")), name="other", protocol="http")
        }
        for name, attack in ATTACKS.items():
            listen, target = closed_port(), closed_port()
            if attack.target is None:
                target = stack.enter_context(good_target(tmp_path, f"attacked-{len(routes)}"))
                clients.append((listen, True))
            else:
                limit = RATE * attack.limit if attack.attacker == "target" else 0.0
                stack.enter_context(Attackers(name, "target", target, limit))
            routes[listen] = attacked_route(name, listen, target)
        server = stack.enter_context(
            service(tmp_path, routes, process={"env": os.environ | environment}, module="tests.support.counted")
        )
        for listen, (name, attack) in zip(list(routes)[1:], ATTACKS.items(), strict=True):
            limit = RATE * attack.limit if attack.attacker == "clients" else 0.0
            stack.enter_context(Attackers(name, "clients", listen, limit))
        jobs = [gevent.spawn(good.run, *where) for where in [*clients, *[(other, False)] * CLIENTS]]
        (worker,) = server.workers()
        samples, end = [], monotonic() + SECONDS
        while monotonic() < end:
            gevent.sleep(SECONDS / SAMPLES)
            samples.append(sample(worker, tmp_path))
            gevent.joinall([job for job in jobs if job.ready()], raise_error=True)
        good.is_over = True
        gevent.joinall(jobs, raise_error=True)
        assert server.workers() == [worker], "the worker was replaced"
    samples = samples[int(WARMUP * len(samples)) :]
    quarter = len(samples) // 4
    parts = samples[:quarter], samples[-quarter:]
    first, last = ({what: median(each[what] for each in part) for what in ALLOWED} for part in parts)
    print(f"\n{', '.join(f'{n:,} {what}' for what, n in sorted(good.outcomes.items()))}")
    print("\n".join(f"{what:14} first quarter {first[what]:,.0f}, last {last[what]:,.0f}" for what in ALLOWED))
    assert good.outcomes["answered"] > 0
    assert not {what for what in ALLOWED if last[what] > first[what] + ALLOWED[what]}
