"""-p, -l, -t: what is framed, where clients connect, where requests go."""

from __future__ import annotations

import socket as plain
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.support.clients import Client
from tests.support.framing import MPU
from tests.support.service import Server
from tests.support.target import Target

needs_ipv6 = pytest.mark.skipif(not plain.has_dualstack_ipv6(), reason="no IPv6 here")


@contextmanager
def reserved_port(family: plain.AddressFamily) -> Iterator[int]:
    """A port that is free at all addresses, with IPv6 also at those of IPv4.

    It stays bound and does not listen: nobody else gets it at any address, and gmux can have it (SO_REUSEADDR).
    """
    with plain.socket(family) as sock:
        sock.setsockopt(plain.SOL_SOCKET, plain.SO_REUSEADDR, 1)
        if family == plain.AF_INET6:
            sock.setsockopt(plain.IPPROTO_IPV6, plain.IPV6_V6ONLY, 0)
        sock.bind(("", 0))
        yield sock.getsockname()[1]


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
    with ExitStack() as stack:
        port = stack.enter_context(reserved_port(plain.AF_INET))
        target = stack.enter_context(Target())
        server = stack.enter_context(Server(target, "-l", f"127.0.0.2:{port}", listen=""))
        assert server.address == ("127.0.0.2", port)
        assert takes_clients("127.0.0.2", port)
        assert not takes_clients("127.0.0.1", port)


@needs_ipv6
def test_listen_and_target_with_ipv6_addresses_take_clients_and_requests_there():
    with reserved_port(plain.AF_INET6) as port, Target(address=("::1", 0)) as target:
        words = ("-l", f"[::1]:{port}", "-t", f"[::1]:{target.server_port}")
        with Server(target, *words, listen="", target="") as server:
            assert server.address == ("::1", port)
            assert takes_clients("::1", port)
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
