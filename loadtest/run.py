"""The load test: what gmux adds to the answer time of a target, at so many users, with locust.

Usage: run.py [options]

Options:
  --proto NAME     echo, http or iso8583 [default: http]
  --delay TIME     time of service of each request in the target [default: 1ms]
  --users LIST     the steps, in users [default: 1,10,50,200]
  --rate N         requests per second of each user [default: 10]
  --pool-size N    upstream connections of gmux, strict and pipelined; the pool has four times as many [default: 1]
  --pipeline N     requests in flight on a connection, pipelined [default: 32]
  --seconds N      measured, for each step of each variant [default: 4]
  --warmup N       seconds before, which are left out: connections are made, code runs for the first time [default: 1]
  --out FOLDER     where the results go [default: loadtest/out]
  -h --help        show this help and exit

Exit codes: 0; 1 when a request failed or the test could not be done; 2 for wrong arguments.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import docopt

from gmux.samples import command
from loadtest import options, report
from loadtest.processes import (
    PATIENCE,
    GmuxProcess,
    Process,
    ProcessFailed,
    TargetProcess,
    interrupt_on_terminate,
)
from loadtest.protocols import Protocol
from loadtest.report import DIRECT, Run

LOCUSTFILE = Path(__file__).with_name("locustfile.py")

#: A locust that needs more of its processor than this measures itself.
MAX_CPU = 0.9

#: Users of one step: each is a descriptor of locust, of gmux and of the target.
MAX_USERS = 400


@dataclass(frozen=True)
class Settings:
    protocol: Protocol
    delay: float
    users: Sequence[int]
    rate: int
    pool_size: int
    pipeline: int
    seconds: int
    warmup: int
    out: Path

    @classmethod
    def read(cls, words: docopt.ParsedOptions) -> Settings:
        return cls(
            options.protocol(words),
            options.delay(words, "--delay"),
            options.steps(words, "--users", MAX_USERS),
            options.whole(words, "--rate", 1, 100),
            options.whole(words, "--pool-size", 1, 100),
            options.whole(words, "--pipeline", 2, 1000),
            options.whole(words, "--seconds", 1, 60),
            options.whole(words, "--warmup", 0, 60),
            Path(words["--out"]),
        )


@dataclass(frozen=True)
class Variant:
    """A way to the target: with these flags of gmux, or none at all; `connections` to the target, `depth` on each."""

    name: str
    connections: int
    depth: int = 1
    flags: Sequence[str] | None = None

    def is_saturated(self, offered: float, delay: float) -> bool:
        """Whether the requests that are offered keep all places in flight busy, and leave no time for the way."""
        return offered * delay >= self.connections * self.depth


def variants(settings: Settings) -> list[Variant]:
    size, wide, depth = settings.pool_size, 4 * settings.pool_size, settings.pipeline
    return [
        Variant(DIRECT, max(settings.users)),
        Variant("strict", size, flags=[f"--pool-size={size}"]),
        Variant(f"pool of {wide}", wide, flags=[f"--pool-size={wide}"]),
        Variant("pipelined", size, depth, flags=[f"--pool-size={size}", f"--pipeline={depth}"]),
    ]


class LoadTest:
    """Targets, and gmux before them, one for each variant: those that have no load sleep. Use it in a `with`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stack = ExitStack()
        self._targets: dict[str, TargetProcess] = {}

    def __enter__(self) -> LoadTest:
        with ExitStack() as stack:
            self._runtime_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gmux-loadtest-")))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, variant: Variant) -> str:
        """Start what the variant needs; its address. Raises ProcessFailed."""
        settings = self._settings
        log = self._log(f"target-{variant.name}")
        target = TargetProcess(settings.protocol, settings.delay, variant.connections, log, self._runtime_dir)
        self._stack.enter_context(target)
        self._targets[variant.name] = target
        address = target.address()
        if variant.flags is None:
            return address
        log = self._log(f"gmux-{variant.name}")
        gmux = GmuxProcess(settings.protocol, address, list(variant.flags), log, self._runtime_dir)
        return self._stack.enter_context(gmux).address()

    def run(self, variant: Variant, address: str, users: int) -> Run:
        """One run of locust. Raises ProcessFailed."""
        settings = self._settings
        name = f"{variant.name}-{users}".replace(" ", "-")
        prefix = settings.out / "locust" / name
        figures = prefix.with_suffix(".json")
        figures.unlink(missing_ok=True)
        flags = {
            "--locustfile": LOCUSTFILE, "--host": address, "--users": users, "--spawn-rate": users,
            "--run-time": f"{settings.seconds + settings.warmup}s", "--loglevel": "WARNING",
            "--html": f"{prefix}.html", "--csv": prefix,
            "--proto": settings.protocol.name, "--rate": settings.rate,
            "--warmup": settings.warmup, "--figures": figures,
        }  # fmt: skip
        words = [f"{flag}={value}" for flag, value in flags.items()]
        log = self._log(f"locust-{name}")
        locust = [sys.executable, "-m", "locust", "--headless", "--only-summary", *words]
        with Process("locust", locust, log, self._runtime_dir) as process:
            process.wait(settings.warmup + settings.seconds + PATIENCE)
        if not figures.exists():
            raise ProcessFailed(f"locust has failed: {process.last_line()}; see {log}")
        told = json.loads(figures.read_text())
        offered = users * settings.rate
        return Run(
            users,
            variant.name,
            offered,
            told["seconds"],
            told["times"],
            variant.is_saturated(offered, settings.delay),
            told["cpu"] > MAX_CPU * told["seconds"],
            told["failures"],
        )

    def refused(self) -> dict[str, int]:
        """End the targets; the connections that each has refused, by variant. Raises ProcessFailed."""
        return {name: target.summary()["refused"] for name, target in self._targets.items()}

    def _log(self, name: str) -> Path:
        return self._settings.out / "logs" / f"{name.replace(' ', '-')}.log"


def run(settings: Settings, ways: Sequence[Variant]) -> tuple[list[Run], list[str]]:
    """All steps of all variants, and what has failed. Raises ProcessFailed."""
    with LoadTest(settings) as test:
        addresses = {way.name: test.start(way) for way in ways}
        runs = []
        for step, users in enumerate(settings.users):
            # Each step begins with another variant, so that what changes on the machine meanwhile hits all alike.
            first = step % len(ways)
            for way in (*ways[first:], *ways[:first]):
                runs.append(test.run(way, addresses[way.name], users))
                print(summary(runs[-1]), flush=True)
        refused = test.refused()
    order = [way.name for way in ways]
    runs.sort(key=lambda one: (one.users, order.index(one.variant)))
    return runs, failures(runs, refused)


def failures(runs: Sequence[Run], refused: Mapping[str, int]) -> list[str]:
    """A line for each kind of failure."""
    lines = [f"{r.users} users, {r.variant}: {count} x {what}" for r in runs for what, count in r.failures.items()]
    return lines + [f"{name}: the target refused {count} connections" for name, count in refused.items() if count]


def summary(one: Run) -> str:
    median = one.latency("p50")
    took = "no answer" if median is None else f"p50 {median:.2f} ms"
    return f"{one.users:5} users, {one.variant}: {one.answered:.1f} answers/s, {took}"


def main() -> None:
    interrupt_on_terminate()
    settings = Settings.read(command.parse(__doc__))
    for package in ("locust", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            command.fail(1, f"{package} is not installed: pip install 'gmux[loadtest]'")
    try:
        for folder in ("locust", "logs"):
            (settings.out / folder).mkdir(parents=True, exist_ok=True)
        ways = variants(settings)
        title = (
            f"{settings.protocol.name}, target delay {settings.delay * 1000:g} ms, {settings.rate} req/s of each user"
        )
        count = len(ways) * len(settings.users)
        print(f"{title}: {count} runs of {settings.seconds} s and {settings.warmup} s of warm-up", flush=True)
        runs, failed = run(settings, ways)
        report.draw(runs, title, settings.out)
        table = report.write_table(runs, settings.out)
    except (ProcessFailed, OSError) as error:
        command.fail(1, str(error))
    except KeyboardInterrupt:
        command.fail(130, "interrupted")
    for line in failed:
        print(f"FAILED: {line}")
    print(f"\n{table}\n\ntimes in ms; latency.png, table.csv and more: {settings.out}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
