"""The benchmark: how fast gmux goes on this machine, strict and pipelined, beside HAProxy with the same budget.

Usage: bench.py [options]

Options:
  --proto NAME     echo, http or iso8583; HAProxy shares its connections for http alone [default: http]
  --delay TIME     time of service of each request in the target [default: 0]
  --clients LIST   the steps, in clients; each asks again as soon as it has its answer [default: 1,16,128]
  --pool-size N    connections to the target, of gmux and of HAProxy [default: 1]
  --pipeline N     requests in flight on a connection, pipelined [default: 32]
  --seconds N      of load, for each step of each proxy in each round [default: 2]
  --rounds N       of which the medians are told [default: 3]
  --out FOLDER     where the logs go [default: loadtest/out/bench]
  -h --help        show this help and exit

Exit codes: 0; 1 when a request failed or the benchmark could not be done; 2 for wrong arguments.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import docopt

from gmux.samples import command
from loadtest import haproxy, load, options, wrk
from loadtest.figures import columns
from loadtest.haproxy import HAProxyProcess
from loadtest.load import Load
from loadtest.processes import (
    GmuxProcess,
    Process,
    ProcessFailed,
    TargetProcess,
    interrupt_on_terminate,
)
from loadtest.protocols import Protocol

DIRECT = "direct"
STRICT = "gmux strict"
PIPELINED = "gmux pipelined"
HAPROXY = "HAProxy"
BUSY = "HAProxy busy-polling"

#: What is divided by what; those that did not run are left out.
RATIOS = ((STRICT, HAPROXY), (STRICT, BUSY), (PIPELINED, HAPROXY), (PIPELINED, BUSY), (PIPELINED, STRICT))

HEADER = ("clients", "proxy", "req/s", "p50 us", "p99 us", "cpu us/req", "pool peak", "wrong", "errors")


@dataclass(frozen=True)
class Settings:
    protocol: Protocol
    delay: float
    clients: Sequence[int]
    pool_size: int
    pipeline: int
    seconds: int
    rounds: int
    out: Path

    @classmethod
    def read(cls, words: docopt.ParsedOptions) -> Settings:
        return cls(
            options.protocol(words),
            options.delay(words, "--delay"),
            options.steps(words, "--clients", 400),
            options.whole(words, "--pool-size", 1, 100),
            options.whole(words, "--pipeline", 2, 1000),
            options.whole(words, "--seconds", 1, 60),
            options.whole(words, "--rounds", 1, 20),
            Path(words["--out"]),
        )


@dataclass(frozen=True)
class Case:
    """One load on one proxy. `cpu` is its processor time for a request in us; the target counts its connections."""

    load: Load
    cpu: float
    peak: int
    refused: int

    @property
    def failed(self) -> int:
        return self.load.errors + (self.load.wrong or 0) + self.refused


#: Makes the process of a proxy in front of a target, given the target's address and a folder for its files.
Start = Callable[[str, Path], Process]


def proxies(settings: Settings) -> dict[str, Start | None]:
    """What is measured, by name; says what is left out, and why. Nothing stands in front of the target directly."""

    def gmux(*flags: str) -> Start:
        words = [f"--pool-size={settings.pool_size}", *flags]
        return lambda target, folder: GmuxProcess(settings.protocol, target, words, settings.out / "gmux.log", folder)

    def with_haproxy(extra: str) -> Start:
        log = settings.out / "haproxy.log"
        return lambda target, folder: HAProxyProcess(target, settings.pool_size, extra, log, folder)

    found = {DIRECT: None, STRICT: gmux(), PIPELINED: gmux(f"--pipeline={settings.pipeline}")}
    if settings.protocol.name != "http":
        print(f"HAProxy is left out: with {settings.protocol.name} it cannot share a connection")
    elif haproxy.command():
        found |= {HAPROXY: with_haproxy(""), BUSY: with_haproxy("busy-polling")}
    else:
        print("HAProxy is left out: it is not installed (Debian: apt-get install haproxy)")
    return found


def generator(settings: Settings) -> Callable[[str, int, Path], Load]:
    """What makes the load, given an address, a number of clients and a folder; says what is missing."""
    if settings.protocol.name == "http":
        if wrk.is_installed():
            log = settings.out / "wrk.log"
            return lambda address, clients, folder: wrk.run(address, clients, settings.seconds, log, folder)
        print("the load is made in Python, which takes more of the processors: for wrk, apt-get install wrk")
    return lambda address, clients, folder: load.run(settings.protocol, address, clients, settings.seconds)


def measure(settings: Settings, start: Start | None, clients: int, generate: Callable[[str, int, Path], Load]) -> Case:
    """One load on a target and a proxy of its own. Raises ProcessFailed.

    Nothing of them is left when the next begins: HAProxy that polls would take a processor from it.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gmux-bench-")))
        limit = settings.pool_size if start else clients
        target = TargetProcess(settings.protocol, settings.delay, limit, settings.out / "target.log", folder)
        address = stack.enter_context(target).address()
        proxy = stack.enter_context(start(address, folder)) if start else None
        if proxy:
            address = proxy.address()
        before = proxy.cpu_seconds() if proxy else 0.0
        seen = generate(address, clients, folder)
        spent = proxy.cpu_seconds() - before if proxy else 0.0
        if proxy:
            proxy.end()
        told = target.summary()
    return Case(seen, spent * 1e6 / max(1, seen.requests), told["peak"], told["refused"])


def run(settings: Settings) -> dict[tuple[int, str], list[Case]]:
    """All cases by clients and name, a case for each round. Raises ProcessFailed."""
    ways = proxies(settings)
    generate = generator(settings)
    cases: dict[tuple[int, str], list[Case]] = {(n, name): [] for n in settings.clients for name in ways}
    names = list(ways)
    turn = 0
    for number in range(settings.rounds):
        for clients in settings.clients:
            # Each turn begins with another one, so that what changes on the machine meanwhile hits all alike.
            first = turn % len(names)
            turn += 1
            for name in (*names[first:], *names[:first]):
                cases[clients, name].append(measure(settings, ways[name], clients, generate))
        print(f"round {number + 1} of {settings.rounds} is done", flush=True)
    return cases


def table(cases: dict[tuple[int, str], list[Case]]) -> list[Sequence[str]]:
    """Medians, but for what must not happen even once: the sums of it, and the highest peak."""
    return [HEADER, *(_row(clients, name, found) for (clients, name), found in cases.items())]


def _row(clients: int, name: str, cases: Sequence[Case]) -> Sequence[str]:
    loads = [case.load for case in cases]
    return (
        str(clients),
        name,
        *(f"{median(values):.0f}" for values in zip(*((one.rate, one.p50, one.p99) for one in loads), strict=True)),
        "-" if name == DIRECT else f"{median(case.cpu for case in cases):.1f}",
        str(max(case.peak for case in cases)),
        "-" if any(one.wrong is None for one in loads) else str(sum(one.wrong or 0 for one in loads)),
        str(sum(one.errors for one in loads) + sum(case.refused for case in cases)),
    )


def ratios(cases: dict[tuple[int, str], list[Case]]) -> list[Sequence[str]]:
    """Of the medians; above 1 is good for requests a second, below 1 for the answer time."""
    found: list[Sequence[str]] = [("clients", "proxy", "req/s", "p50")]
    for clients in dict.fromkeys(clients for clients, _ in cases):
        for one, other in RATIOS:
            if (clients, one) in cases and (clients, other) in cases:
                a, b = ([case.load for case in cases[clients, name]] for name in (one, other))
                rate = median(x.rate for x in a) / median(x.rate for x in b)
                p50 = median(x.p50 for x in a) / median(x.p50 for x in b)
                found.append((str(clients), f"{one} / {other}", f"{rate:.2f}", f"{p50:.2f}"))
    return found


def main() -> None:
    interrupt_on_terminate()
    settings = Settings.read(command.parse(__doc__))
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        connections = f"{settings.pool_size} connection(s)"
        print(f"{settings.protocol.name}, {connections}, target delay {settings.delay * 1000:g} ms", flush=True)
        cases = run(settings)
    except (ProcessFailed, OSError) as error:
        command.fail(1, str(error))
    except KeyboardInterrupt:
        command.fail(130, "interrupted")
    print(f"\n{columns(table(cases))}\n\nmedians of {settings.rounds} rounds of {settings.seconds} s")
    if len(compared := ratios(cases)) > 1:
        print(f"\n{columns(compared)}")
    failed = sum(case.failed for found in cases.values() for case in found)
    if failed:
        print(f"FAILED: {failed} requests or connections; see the columns wrong and errors")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
