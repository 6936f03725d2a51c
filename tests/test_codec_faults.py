"""A fault of a codec, perhaps of another package, ends what it concerns, and the log says where it is."""

from __future__ import annotations

import logging
from contextlib import ExitStack

import gevent
import pytest

from gmux.codecs.echo import EchoCodec
from gmux.codecs.framed import FrameAnswerDecoder
from gmux.worker import report_fault
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.service import serving
from tests.support.target import Target, close, closed_port, half, never, send
from tests.support.wait import wait_until

MODES = {"strict": {}, "pipelined": {"pipeline": "4"}}
each_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def fail(*args):
    raise ValueError("a fault of the codec")


@each_mode
def test_refuse_that_fails_ends_each_client_and_strands_none(mode, monkeypatch, caplog):
    monkeypatch.setattr(EchoCodec, "refuse", fail)
    settings = {"protocol": "echo", "pool_min": "0"} | mode
    with serving(closed_port(), **settings) as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(5)]
        for client in clients:
            client.send(b"hello")
        for client in clients:
            client.receive_end()
    assert "a fault of the codec" in caplog.text
    assert "test_codec_faults.py, line " in caplog.text


@each_mode
def test_refuse_that_fails_for_those_in_the_queue(mode, monkeypatch):
    monkeypatch.setattr(EchoCodec, "refuse", fail)
    settings = {"queue_timeout": "50ms", "timeout": "300ms"}
    with Target(never) as target, serving(target, **settings) as service, ExitStack() as stack:
        clients = [stack.enter_context(Client(service.address)) for _ in range(5)]
        for client in clients:
            client.send(b"hello")
        for client in clients:
            client.receive_end()
        assert service.waiting == 0


@each_mode
def test_end_of_an_answer_that_fails_the_codec_ends_its_client_at_once(mode, monkeypatch, caplog):
    monkeypatch.setattr(FrameAnswerDecoder, "receive_eof", fail)
    with Target((half, close)) as target, serving(target, timeout="1h", **mode) as service:
        with Client(service.address) as client:
            client.send(b"hello")
            client.receive_end()
        target.behaviour = never
        wait_until(lambda: service.is_ready, what="another connection")
        assert target.peak == 1
    assert "a fault of the codec" in caplog.text


@each_mode
def test_message_that_nobody_asked_for_and_that_fails_the_codec_ends_the_connection(mode, monkeypatch, caplog):
    with caplog.at_level(logging.INFO), Target() as target, serving(target, unsolicited="drop", **mode) as service:
        service.wait_ready()
        with monkeypatch.context() as patch:
            patch.setattr(EchoCodec, "describe", fail)
            target.say(b"hello\n")
            wait_until(lambda: target.accepted == 2)
        with Client(service.address) as client:
            assert client.ask(b"x") == b"x"
    assert "a fault of the codec" in caplog.text


def test_answer_that_fails_the_codec_says_where(monkeypatch, caplog):
    with Target((send(b"hello\n"),)) as target, serving(target) as service:
        service.wait_ready()
        monkeypatch.setattr(FrameAnswerDecoder, "next_event", fail)
        with Client(service.address) as client:
            client.send(b"x")
            client.receive_end()
    assert "test_codec_faults.py, line " in caplog.text


def test_fault_that_reaches_the_loop_is_logged_in_a_line_with_its_place(monkeypatch, caplog):
    hub = gevent.get_hub()
    monkeypatch.setattr(hub, "print_exception", report_fault)
    monkeypatch.setattr(hub, "handle_error", type(hub).handle_error.__get__(hub))
    hub.loop.run_callback(fail)
    wait_until(lambda: "please report it" in caplog.text)
    [line] = [record.message for record in caplog.records if "please report it" in record.message]
    assert "ValueError('a fault of the codec') in " in line and "test_codec_faults.py, line " in line
    assert "\n" not in line


def test_fault_that_reaches_the_loop_is_logged_by_its_route(monkeypatch, caplog):
    class OfRoute:
        _log = logging.getLogger("gmux.north")

        def run(self):
            fail()

    hub = gevent.get_hub()
    monkeypatch.setattr(hub, "print_exception", report_fault)
    monkeypatch.setattr(hub, "handle_error", type(hub).handle_error.__get__(hub))
    hub.loop.run_callback(OfRoute().run)
    gevent.spawn(OfRoute().run).join()
    names = [record.name for record in caplog.records if "please report it" in record.message]
    assert names == ["gmux.north"] * 2
