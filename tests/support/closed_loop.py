"""Clients that ask again as soon as they have their answer, in a process of their own.

Run as a program: `closed_loop PROTOCOL HOST:PORT CLIENTS SECONDS`; it prints what `loadtest.load` has seen, as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import sys

from gevent import subprocess

from gmux.net import Address, format_address
from loadtest import load
from loadtest.protocols import PROTOCOLS
from tests.support.service import ROOT


def allow_descriptors() -> None:
    """As many as the system lets this process and its children have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def measure(protocol: str, address: Address, clients: int, seconds: float) -> load.Load:
    words = [protocol, format_address(address), str(clients), str(seconds)]
    output = subprocess.check_output([sys.executable, "-m", "tests.support.closed_loop", *words], cwd=ROOT)
    return load.Load(**json.loads(output))


if __name__ == "__main__":
    allow_descriptors()
    seen = load.run(PROTOCOLS[sys.argv[1]], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
    print(json.dumps(dataclasses.asdict(seen)))
