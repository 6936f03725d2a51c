"""What tests of several flags need: a request of HTTP with its answer taken apart, and what a process uses."""

from __future__ import annotations

import os
from pathlib import Path

from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.service import Server

MEGABYTE = 1 << 20


def send_http(client: Client, body: bytes = b"") -> None:
    client.send_raw(b"POST /it HTTP/1.1\r\nHost: target\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def receive_http(client: Client) -> tuple[int, str]:
    """The status and the body of the next answer. Raises Closed."""
    answer = HTTP.read(client)
    return int(answer[9:12]), HTTP.payload(answer).decode()


def ask_http(server: Server, body: bytes = b"") -> tuple[int, str]:
    """What a client of its own gets for one request."""
    with Client(server.address, HTTP) as client:
        send_http(client, body)
        return receive_http(client)


def cpu_seconds(pid: int) -> float:
    """The processor time that the process has used, in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
