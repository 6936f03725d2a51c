"""The processes of a measurement: started, waited for, ended by their handle whatever happens, and their CPU time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from loadtest.protocols import Protocol

ROOT = Path(__file__).parents[1]

#: Seconds for a process to start, and to end when it is asked to.
PATIENCE = 15.0

LISTENING = re.compile(r"listening on (127\.0\.0\.1:[0-9]+)")


class ProcessFailed(Exception):
    """A process did not do its part; the text names it and its last words."""


class Process:
    """A child whose output goes to a file. Use it in a `with`, whose end is its end."""

    def __init__(self, name: str, words: list[str], log: Path, runtime_dir: Path) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                words,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Slots of its own: a gmux that runs on this machine anyway must not have a say.
                env={**os.environ, "XDG_RUNTIME_DIR": str(runtime_dir)},
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def is_running(self) -> bool:
        return self._popen.poll() is None

    def end(self) -> None:
        if self.is_running:
            self._popen.terminate()
            try:
                self._popen.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                for pid in self._family():
                    os.kill(pid, signal.SIGKILL)
                self._popen.wait()

    def wait(self, seconds: float) -> int:
        """The exit code. Raises ProcessFailed when it does not end in time."""
        try:
            return self._popen.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ProcessFailed(f"{self.name} did not end within {seconds:g} s; see {self.log}") from None

    def address(self) -> str:
        """Where it listens, by what it says. Raises ProcessFailed."""
        end = time.monotonic() + PATIENCE
        while not (said := LISTENING.search(self.log.read_text(errors="replace"))):
            self.check(end)
        return said[1]

    def check(self, end: float) -> None:
        """Sleep a moment; raises ProcessFailed when it has ended, or the time `end` has come."""
        if not self.is_running or time.monotonic() > end:
            raise ProcessFailed(f"{self.name} did not start: {self.last_line() or 'it said nothing'}; see {self.log}")
        time.sleep(0.01)

    def last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "")

    def cpu_seconds(self) -> float:
        """Processor time so far, with its children's."""
        ticks = 0
        for pid in self._family():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _family(self) -> list[int]:
        pids = [self._popen.pid]
        for pid in pids:
            pids += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return pids


class TargetProcess(Process):
    """The target, with `connections` at most."""

    def __init__(self, protocol: Protocol, delay: float, connections: int, log: Path, runtime_dir: Path) -> None:
        flags = [f"--proto={protocol.name}", f"--delay={delay:.6f}", f"--max-connections={connections}"]
        super().__init__("the target", [sys.executable, "-m", "loadtest.target", *flags], log, runtime_dir)

    def summary(self) -> dict[str, Any]:
        """End it; what it has seen. Raises ProcessFailed."""
        self.end()
        try:
            summary: dict[str, Any] = json.loads(self.last_line())
        except ValueError:
            raise ProcessFailed(f"the target has failed: {self.last_line()}; see {self.log}") from None
        return summary


class GmuxProcess(Process):
    """gmux in front of `target`, on a free port."""

    def __init__(self, protocol: Protocol, target: str, flags: list[str], log: Path, runtime_dir: Path) -> None:
        route = ["-p", protocol.name, "-l", "127.0.0.1:0", "-t", target]
        super().__init__("gmux", [sys.executable, "-m", "gmux", "server", *route, *flags], log, runtime_dir)


def interrupt_on_terminate() -> None:
    """Let TERM unwind the stack, as ^C does, so that every process started is ended."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
