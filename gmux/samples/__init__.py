"""Sample targets: small servers for the protocols of gmux, to try it and to test it.

The same targets are behind `gmux server -t embedded` and behind `examples/*_server.py`.
"""

from __future__ import annotations

from gmux import net
from gmux.errors import ConfigError
from gmux.logs import LOGGER
from gmux.samples.echo import EchoTarget
from gmux.samples.http import HttpTarget
from gmux.samples.iso8583 import Iso8583Target, MpuTarget
from gmux.samples.target import Target

TARGETS: dict[str, type[Target]] = {
    target.protocol: target for target in (EchoTarget, HttpTarget, Iso8583Target, MpuTarget)
}


def check(protocol: str) -> None:
    """Raises ConfigError when there is no sample target for `protocol`."""
    if protocol not in TARGETS:
        raise ConfigError(
            f"--target: 'embedded' is not allowed with --protocol {protocol}: only {', '.join(TARGETS)} have a sample"
            " target"
        )


def serve(protocol: str, max_connections: int) -> net.Address:
    """Start a target in the running loop, on a free port of 127.0.0.1, and return its address; does not switch.

    It runs as long as the loop. Raises ConfigError, StartError.
    """
    check(protocol)
    target = TARGETS[protocol](("127.0.0.1", 0), max_connections, report=_log)
    target.start()
    host, port = target.address
    return host, port


def _log(line: str) -> None:
    LOGGER.info("embedded target: %s", line)
