"""Which real servers answer requests that are sent together: gmux finds out, and each client gets its own answer."""

from __future__ import annotations

import gevent
import pytest

from gmux.samples.http import HttpTarget
from loadtest.protocols import PROTOCOLS
from loadtest.target import LoadTarget
from tests.peers.support import Address, target, write_files
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.programs import program, running
from tests.support.service import Server
from tests.support.wait import wait_until

CLIENTS, EACH = 12, 8

GRANTED = "the target answers requests that are sent together"


def ask_many(address: Address, prefix: bytes = b"/token/") -> None:
    """Clients that ask at once, each for pages of its own."""

    def use(number: int) -> None:
        with Client(address, HTTP) as client:
            for n in range(EACH):
                name = prefix + b"c%d.r%d." % (number, n)
                client.send_raw(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % name)
                assert name in client.receive()

    gevent.joinall([gevent.spawn(use, number) for number in range(CLIENTS)], raise_error=True)


@pytest.mark.parametrize("name", ["nginx", "node", "gunicorn", "http.server-1.1"])
def test_server_that_answers_them_is_given_several_at_a_time(name, tmp_path):
    with (
        target(name, write_files(tmp_path / "files"), tmp_path) as where,
        Server(where, protocol="http", pipeline="16") as server,
    ):
        ask_many(server.address)
        wait_until(lambda: server.said(GRANTED))
        assert not [line for line in server.log if not line.startswith("INFO")]


def test_server_of_http_1_0_is_served_one_by_one_with_a_warning(tmp_path):
    with (
        target("http.server-1.0", write_files(tmp_path / "files"), tmp_path) as where,
        Server(where, protocol="http", pipeline="16") as server,
    ):
        ask_many(server.address)
        wait_until(lambda: server.said("requests go one by one"))


def test_haproxy_before_a_server_answers_them(tmp_path):
    with target("node", write_files(tmp_path / "files"), tmp_path) as behind:
        config = tmp_path / "haproxy.cfg"
        socket = tmp_path / "haproxy.sock"
        config.write_text(
            "defaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n"
            f"listen here\n bind {socket}\n server one {behind[0]}:{behind[1]}\n"
        )
        with running([program("haproxy"), "-db", "-f", str(config)]):
            wait_until(socket.exists)
            with Server(str(socket), protocol="http", pipeline="16") as server:
                ask_many(server.address)
                wait_until(lambda: server.said(GRANTED))


@pytest.mark.parametrize(
    "make", [lambda: HttpTarget(("127.0.0.1", 0)), lambda: LoadTarget(PROTOCOLS["http"], ("127.0.0.1", 0), 1)]
)
def test_targets_of_gmux_itself_answer_them(make):
    sample = make()
    sample.start()
    try:
        with Server(sample.address, protocol="http", pipeline="32") as server:
            ask_many(server.address, b"/")
            wait_until(lambda: server.said(GRANTED))
    finally:
        sample.stop()
