"""wrk as the load generator for HTTP: it costs less processor time than ours, and does not look whose an answer is."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from loadtest.load import Load, processes
from loadtest.processes import PATIENCE, Process, ProcessFailed

SCRIPT = Path(__file__).with_suffix(".lua")

RESULT = re.compile(r"^RESULT ([0-9]+) ([0-9]+) ([0-9]+) ([0-9]+) ([0-9]+)$", re.MULTILINE)


def is_installed() -> bool:
    return shutil.which("wrk") is not None


def run(address: str, clients: int, seconds: int, log: Path, runtime_dir: Path) -> Load:
    """Load `address`, HOST:PORT. Raises ProcessFailed."""
    flags = [f"-t{processes(clients)}", f"-c{clients}", f"-d{seconds}s", f"-s{SCRIPT}"]
    with Process("wrk", ["wrk", *flags, f"http://{address}/"], log, runtime_dir) as process:
        process.wait(seconds + PATIENCE)
    result = RESULT.search(log.read_text())
    if not result:
        raise ProcessFailed(f"wrk has failed: {process.last_line()}; see {log}")
    requests, microseconds, errors, p50, p99 = map(int, result.groups())
    return Load(requests, None, errors, requests / (microseconds / 1e6), p50, p99)
