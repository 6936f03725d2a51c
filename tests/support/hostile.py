"""Services whose routes are attacked, and the processes of the attacks."""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gevent import subprocess

from gmux.net import Address, format_address
from loadtest.processes import TargetProcess
from loadtest.protocols import PROTOCOLS
from tests.support.attacks import ATTACKS
from tests.support.service import ROOT, Server
from tests.support.wait import wait_until


class Attackers:
    """One side of an attack, `clients` or `target`, at `limit` bytes a second. Use it in a `with`.

    `sent` is what it said at its end, in bytes a second.
    """

    def __init__(self, name: str, side: str, address: Address, limit: float = 0.0) -> None:
        words = [sys.executable, "-m", "tests.support.attacks", name, side, format_address(address), str(limit)]
        self._process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        if side == "target":
            assert self._process.stdout.readline() == b"listening\n"

    def __enter__(self) -> Attackers:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        output, _ = self._process.communicate()
        self.sent = float(output)


@contextmanager
def good_target(folder: Path, name: str, protocol: str = "http") -> Iterator[Address]:
    with TargetProcess(PROTOCOLS[protocol], 0.0, 1, folder / f"{name}.log", folder) as process:
        host, _, port = process.address().rpartition(":")
        yield host, int(port)


def attacked_route(name: str, listen: Address, target: Address) -> str:
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower())
    return route(listen, target, name=plain, protocol=ATTACKS[name].protocol, **ATTACKS[name].settings)


def route(listen: Address, target: Address, **settings: str) -> str:
    """A section of a configuration file."""
    settings |= {"listen": format_address(listen), "target": format_address(target)}
    settings = {"retry_delay": "10ms", "max_clients": "1000"} | settings
    return "\n".join(["[[route]]", *(f"{key.replace('_', '-')} = '{value}'" for key, value in settings.items()), ""])


@contextmanager
def service(folder: Path, routes: dict[Address, str], **options: Any) -> Iterator[Server]:
    """A service of one worker, with a section for each address where it listens."""
    config = folder / "gmux.toml"
    config.write_text("\n".join(routes.values()))
    unset = dict.fromkeys(("listen", "target", "max_clients", "retry_delay"), "")
    runtime = str(folder / "runtime")
    address = ("", 0)
    with Server(address, f"--config={config}", log_level="error", runtime_dir=runtime, **unset, **options) as server:
        wait_until(lambda: all(map(is_listening, routes)), what="all routes")
        yield server


def is_listening(address: Address) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0
