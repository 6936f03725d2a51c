"""-p, -l, -t: what is framed, where clients connect, where requests go."""

from __future__ import annotations

import socket as plain
from contextlib import closing

import pytest

from tests.support.clients import Client
from tests.support.framing import MPU
from tests.support.service import Server
from tests.support.target import Target

needs_ipv6 = pytest.mark.skipif(not plain.has_dualstack_ipv6(), reason="no IPv6 here")


def takes_clients(host: str, port: int) -> bool:
    """Whether somebody listens there; the client itself is answered."""
    try:
        client = Client((host, port))
    except ConnectionRefusedError:
        return False
    with client:
        return client.ask(b"hello") == b"hello"


def test_protocol_mpu_is_framed_by_length_and_not_by_line():
    with Target(framing=MPU) as target, Server(target, "-p", "mpu", protocol="") as server:
        with Client(server.address, MPU) as client:
            assert client.ask(b"no end of line") == b"no end of line"
        assert target.requests == [b"no end of line"]


@needs_ipv6
def test_listen_bare_port_takes_clients_at_all_addresses():
    with Target() as target, Server(target, "-l", "0", listen="") as server:
        port = server.address[1]
        assert [host for host in ("127.0.0.1", "127.0.0.2", "::1") if not takes_clients(host, port)] == []


def test_listen_host_and_port_takes_clients_there_alone():
    # Bound and not listening: nobody else gets the port, and gmux can have it (SO_REUSEADDR).
    with closing(plain.socket()) as reserved, Target() as target:
        reserved.setsockopt(plain.SOL_SOCKET, plain.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.2", 0))
        port = reserved.getsockname()[1]
        with Server(target, "-l", f"127.0.0.2:{port}", listen="") as server:
            assert server.address == ("127.0.0.2", port)
            assert takes_clients("127.0.0.2", port)
            assert not takes_clients("127.0.0.1", port)


@needs_ipv6
def test_listen_and_target_with_ipv6_addresses_take_clients_and_requests_there():
    with Target(address=("::1", 0)) as target:
        with Server(target, "-l", "[::1]:0", "-t", f"[::1]:{target.server_port}", listen="", target="") as server:
            host, port = server.address
            assert host == "::1"
            assert takes_clients(host, port)
            assert not takes_clients("127.0.0.1", port)
        assert target.requests == [b"hello"]


def test_target_given_gets_the_requests():
    with Target() as target:
        with Server(target, "-t", f"127.0.0.1:{target.server_port}", target="") as server:
            assert takes_clients(*server.address)
        assert target.requests == [b"hello"]


def test_target_and_protocol_by_their_old_names_are_the_same():
    with Target(framing=MPU) as target:
        words = ("--targetServer", f"127.0.0.1:{target.server_port}", "--applicationProtocol", "mpu")
        with Server(target, *words, target="", protocol="") as server, Client(server.address, MPU) as client:
            assert client.ask(b"hello") == b"hello"
        assert target.requests == [b"hello"]


def test_target_embedded_answers_from_inside():
    with Target() as unused:
        with Server(unused, "-t", "embedded", target="") as server, Client(server.address) as client:
            assert b"hello" in client.ask(b"hello")
        assert unused.accepted == 0
