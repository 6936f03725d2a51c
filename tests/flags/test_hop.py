"""Flags for what belongs to one hop: what a target says unasked, echo tests, greetings."""

from __future__ import annotations

from contextlib import ExitStack

import iso8583
import pytest
from iso8583.specs import default_ascii as SPEC

from tests.support.clients import Client
from tests.support.framing import ISO8583, LINE
from tests.support.service import Server
from tests.support.target import Target, answer
from tests.support.wait import wait_until

ECHO_TEST = bytes(iso8583.encode({"t": "0800", "7": "1122153000", "11": "000009", "70": "301"}, SPEC)[0])


@pytest.mark.parametrize(("policy", "connections"), [("close", 2), ("drop", 1), ("broadcast", 1)])
def test_unsolicited_line_is_doubt_or_nothing_or_for_all(policy, connections):
    words = ("--unsolicited", policy)
    with Target((answer,), LINE) as target, Server(target, *words) as server, Client(server.address) as client:
        assert client.ask(b"one") == b"one"
        target.connections[0].send(b"own\n")
        if policy == "broadcast":
            assert client.receive() == b"own"
        if policy == "close":
            wait_until(lambda: target.accepted == 2)
        assert client.ask(b"two") == b"two"
        assert target.accepted == connections


def test_answer_network_management_takes_an_echo_test_off_the_target():
    with ExitStack() as stack:
        target = stack.enter_context(Target((answer,), ISO8583))
        server = stack.enter_context(Server(target, "--answer-network-management"))
        client = stack.enter_context(Client(server.address, ISO8583))
        client.send(ECHO_TEST)
        assert iso8583.decode(client.receive(), SPEC)[0]["t"] == "0810"
        assert target.requests == []


def test_on_connect_file_is_sent_before_the_first_request(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello")
    words = ("--on-connect", str(tmp_path / "hello"))
    with Target((answer,), LINE) as target, Server(target, *words) as server, Client(server.address) as client:
        assert client.ask(b"one") == b"one"
        assert target.requests == [b"hello", b"one"]


def test_idle_check_sends_an_echo_test_of_its_own():
    with Target((answer,), ISO8583) as target, Server(target, "--idle-check", "50ms"):
        wait_until(lambda: target.requests)
        assert iso8583.decode(target.requests[0], SPEC)[0]["70"] == "301"
