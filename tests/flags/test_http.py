"""Flags of http alone: what the target sees of a request, and the client of an answer."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.ntlm import NtlmClient, NtlmTarget
from tests.support.service import Server
from tests.support.target import Target, answer
from tests.support.wait import wait_until


def seen(*words: str, fields: bytes = b"") -> tuple[list[bytes], bytes]:
    """The lines of the request that the target gets, without the first, and the whole answer that the client gets."""
    requests: list[bytes] = []

    def behaviour(connection, request):
        requests.append(request)
        return (answer,)

    with ExitStack() as stack:
        target = stack.enter_context(Target(behaviour, framing=HTTP))
        server = stack.enter_context(Server(target, *words))
        client = stack.enter_context(Client(server.address, HTTP))
        client.send_raw(b"GET /it HTTP/1.1\r\nHost: asked:80\r\n" + fields + b"\r\n")
        told = HTTP.read(client)
    (request,) = requests
    return request[:-4].split(b"\r\n")[1:], told


def test_via_is_added_both_ways_unless_it_is_turned_off():
    lines, told = seen()
    assert b"Via: 1.1 gmux" in lines
    assert b"\r\nVia: 1.1 gmux\r\n" in told
    lines, told = seen("--no-via")
    assert lines == [b"Host: asked:80", b"Connection: keep-alive"]
    assert b"Via" not in told


@pytest.mark.parametrize(
    ("form", "own"),
    [
        ("off", [b"X-Forwarded-For: 1.1.1.1"]),
        ("x-forwarded", [b"X-Forwarded-For: 127.0.0.1", b"X-Forwarded-Proto: http", b"X-Forwarded-Host: asked:80"]),
        ("forwarded", [b'Forwarded: for=127.0.0.1;host="asked:80";proto=http']),
    ],
)
def test_forwarded_tells_the_target_who_asked(form, own):
    lines, _ = seen("--no-via", "--forwarded", form, fields=b"X-Forwarded-For: 1.1.1.1\r\n")
    assert lines == [b"Host: asked:80", *own, b"Connection: keep-alive"]


def test_set_header_given_several_times_sets_removes_and_replaces():
    words = ("--set-header", "X-Key: own", "--set-header=Authorization: Basic eDp5", "--set-header", "Cookie:")
    lines, _ = seen("--no-via", *words, fields=b"Cookie: a=b\r\nX-KEY: client\r\n")
    assert lines == [b"Host: asked:80", b"X-Key: own", b"Authorization: Basic eDp5", b"Connection: keep-alive"]


def test_host_of_the_operator_stands_for_that_of_the_client():
    lines, _ = seen("--no-via", "--host", "own.example")
    assert lines == [b"Host: own.example", b"Connection: keep-alive"]


def test_private_timeout_over_closes_the_connection_and_others_get_their_turn():
    with NtlmTarget(1) as target, Server(target, private_timeout="200ms") as server:
        with NtlmClient(server.address, b"user") as user, NtlmClient(server.address) as other:
            user.sign_on()
            assert user.get(b"a") == (200, b"user a")
            assert other.get(b"b") == (200, b"nobody b")
            wait_until(lambda: server.said("sent no request for 0.2 s (--private-timeout)"))
        assert (target.accepted, target.refused) == (2, 0)


def test_private_timeout_not_over_keeps_the_connection_for_its_client():
    with NtlmTarget(1) as target, Server(target, private_timeout="1h", queue_timeout="100ms") as server:
        with NtlmClient(server.address, b"user") as user, NtlmClient(server.address) as other:
            user.sign_on()
            assert other.get(b"b")[0] == 503
            assert user.get(b"a") == (200, b"user a")
        assert target.accepted == 1
