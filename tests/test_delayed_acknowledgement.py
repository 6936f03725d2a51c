"""A target that writes its answers in two pieces, with Nagle's delay, must not wait for a delayed acknowledgement."""

from __future__ import annotations

import socket as plain
from contextlib import ExitStack
from time import monotonic

import pytest

from tests.support.clients import Client
from tests.support.framing import ISO8583
from tests.support.service import serving
from tests.support.target import Target

#: Requests; the kernel's own delay is 40 ms for each from about the tenth on.
MANY = 60


def in_two_writes(connection, request):
    connection.sock.setsockopt(plain.IPPROTO_TCP, plain.TCP_NODELAY, 0)
    data = connection.target.framing.answer(request)
    connection.send(data[:2])
    connection.send(data[2:])


@pytest.mark.parametrize("settings", [{}, {"pipeline": "4", "correlation": "order"}], ids=["strict", "pipelined"])
def test_answers_in_two_writes_do_not_wait(settings):
    with Target((in_two_writes,), ISO8583) as target, serving(target, **settings) as service, ExitStack() as stack:
        client = stack.enter_context(Client(service.address, ISO8583))
        begin = monotonic()
        for number in range(MANY):
            assert client.ask(b"%d" % number) == b"%d" % number
        assert monotonic() - begin < MANY * 0.02
