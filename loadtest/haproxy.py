"""HAProxy with the budget of gmux: so many connections to the target, shared by all clients."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path

from loadtest.processes import PATIENCE, Process

#: One thread, as gmux has one worker.
CONFIG = """\
global
    maxconn 4000
    nbthread 1
    {extra}
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    timeout queue 60s
listen bench
    bind {address}
    http-reuse always
    server target {target} maxconn {connections}
"""


def command() -> str | None:
    """Debian has it where only root looks."""
    return shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")


class HAProxyProcess(Process):
    def __init__(self, target: str, connections: int, extra: str, log: Path, runtime_dir: Path) -> None:
        self._address = f"127.0.0.1:{free_port()}"
        config = runtime_dir / "haproxy.cfg"
        config.write_text(CONFIG.format(extra=extra, address=self._address, target=target, connections=connections))
        super().__init__("haproxy", [command() or "haproxy", "-db", "-f", str(config)], log, runtime_dir)

    def address(self) -> str:
        """It does not tell when it listens, so it is tried. Raises ProcessFailed."""
        host, _, port = self._address.rpartition(":")
        end = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection((host, int(port)), PATIENCE).close()
            except OSError:
                self.check(end)
            else:
                return self._address


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
