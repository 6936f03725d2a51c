"""Connections that a target has authenticated for one client: nobody else is ever served as that user."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from time import monotonic

import gevent
import pytest
from gevent import subprocess
from gevent.lock import Semaphore

from gmux.folder import Folder
from gmux.sharing import SLICE, SharedSlots
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.ntlm import TYPE_1, NtlmClient, NtlmTarget, authenticating, reply, type_3
from tests.support.programs import program
from tests.support.service import LOG, Server, Service, serving
from tests.support.stream import Closed
from tests.support.target import Target, hold
from tests.support.wait import wait_until
from tests.test_pipeline import warm

STRICT, PIPELINED = {}, {"pipeline": "4"}
MODES = pytest.mark.parametrize("mode", [STRICT, PIPELINED], ids=["strict", "pipelined"])
SIZES = pytest.mark.parametrize("size", ["1", "2"])

#: Nothing is to end because of this clock.
LONG = {"private_timeout": "1h"}


def credentials(name: bytes) -> bytes:
    return b"NTLM " + type_3(name)


@contextmanager
def scene(limit: int, extra: bytes = b"", **settings: str) -> Iterator[tuple[NtlmTarget, Service]]:
    with NtlmTarget(limit, extra) as target, serving(target, **settings) as service:
        yield target, service


def held(service) -> int:
    """Connections that are some client's own."""
    return len(service.pool._ties)


@MODES
@SIZES
def test_nobody_without_credentials_is_served_as_the_last_user(mode, size):
    with scene(int(size), pool_size=size, **mode, private_timeout="50ms") as (target, service):
        with NtlmClient(service.address, b"alice") as alice, NtlmClient(service.address) as other:
            alice.sign_on()
            for _ in range(3):
                assert other.get(b"x") == (200, b"nobody x")
        assert target.refused == 0


@MODES
@SIZES
def test_client_keeps_its_connection_while_others_hammer(mode, size):
    """Also with a place of the pool for each of those that sign on only, all come through in the end."""
    users, others, rounds = 3, 4, 5
    wrong: list[object] = []
    done = []

    def be_user(name: bytes) -> None:
        for _ in range(rounds):
            with NtlmClient(service.address, name) as client:
                client.sign_on()
                for path in (b"a", b"b", b"c"):
                    if client.get(path) != (200, name + b" " + path):
                        wrong.append((name, path))
        done.append(name)

    def be_other(number: int) -> None:
        with NtlmClient(service.address) as client:
            while len(done) < users:
                path = b"o%d" % number
                if client.get(path) != (200, b"nobody " + path):
                    wrong.append(number)

    with scene(int(size), pool_size=size, **mode, **LONG) as (target, service):
        jobs = [gevent.spawn(be_user, b"user%d" % n) for n in range(users)]
        jobs += [gevent.spawn(be_other, n) for n in range(others)]
        gevent.joinall(jobs, raise_error=True)
        assert not wrong
        assert (target.refused, target.peak) == (0, int(size))


@MODES
def test_client_that_is_known_goes_on_without_credentials(mode):
    with scene(0, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        for path in (b"secret1", b"secret2"):
            assert al.get(path) == (200, b"al " + path)
        assert target.accepted == 1


@MODES
def test_requests_that_a_client_sends_ahead_stay_on_its_connection(mode):
    with scene(0, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.put(b"", b"NTLM " + TYPE_1)
        al.put(b"a", credentials(b"al"))
        al.put(b"b")
        al.put(b"c")
        assert HTTP.read(al).startswith(b"HTTP/1.1 401 ")
        assert [al.take() for _ in range(3)] == [(200, b"al a"), (200, b"al b"), (200, b"al c")]
        assert target.accepted == 1


@MODES
def test_others_wait_and_are_told_why_until_the_private_timeout_is_over(mode, caplog):
    caplog.set_level(logging.INFO)
    with (
        scene(1, **mode, private_timeout="300ms") as (target, service),
        NtlmClient(service.address, b"al") as al,
        NtlmClient(service.address) as other,
    ):
        al.sign_on()
        began = monotonic()
        assert other.get(b"x") == (200, b"nobody x")
        assert 0.2 < monotonic() - began < 2
        assert (target.accepted, target.refused) == (2, 0)
        # The user is a stranger now, and can sign on again.
        assert al.get(b"secret") == (401, b"")
        al.sign_on()
    assert re.search(r"target connection belongs to #1 127\S+ from now on: ", caplog.text)
    assert "sent no request for 0.3 s (--private-timeout)" in caplog.text
    assert caplog.text.count("waits, as clients have all 1 connections to the target for themselves") == 1


def test_wait_for_a_private_connection_ends_with_the_queue_timeout():
    with (
        scene(0, queue_timeout="50ms", **LONG) as (_, service),
        NtlmClient(service.address, b"al") as al,
        NtlmClient(service.address) as other,
    ):
        al.sign_on()
        assert other.get(b"x")[0] == 503
        assert al.get(b"y") == (200, b"al y")


@MODES
@pytest.mark.parametrize("how", ["fin", "reset"])
@pytest.mark.parametrize("legs", [1, 2])
def test_client_that_vanishes_frees_its_connection(mode, how, legs):
    with scene(1, **mode, **LONG) as (target, service), NtlmClient(service.address) as other:
        al = NtlmClient(service.address, b"al")
        al.begin()
        if legs == 2:
            al.finish()
        al.vanish(how)
        assert other.get(b"x") == (200, b"nobody x")
        assert target.refused == 0


@MODES
@pytest.mark.parametrize("how", ["fin", "reset"])
def test_client_that_vanishes_before_its_answer_frees_the_connection(mode, how):
    gate = gevent.lock.Semaphore(0)
    with scene(1, **mode, **LONG) as (target, service), NtlmClient(service.address) as other:
        usual = target.behaviour
        target.behaviour = lambda connection, request: (hold(gate), *usual(connection, request))
        al = NtlmClient(service.address, b"al")
        al.put(b"", b"NTLM " + TYPE_1)
        wait_until(lambda: target.requests)
        al.vanish(how)
        if how == "reset":
            service.wait_clients(1)
        other.put(b"x")
        target.behaviour = usual
        gate.release()
        assert other.take() == (200, b"nobody x")
        assert (target.accepted, target.refused) == (2, 0)


@MODES
def test_client_that_says_close_frees_its_connection(mode):
    with (
        scene(1, **mode, **LONG) as (_, service),
        NtlmClient(service.address) as other,
        NtlmClient(service.address, b"al") as al,
    ):
        al.begin()
        al.send_raw(
            b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\nAuthorization: %b\r\n\r\n" % credentials(b"al")
        )
        assert al.take() == (200, b"al x")
        assert other.get(b"x") == (200, b"nobody x")


@MODES
def test_target_that_ends_a_private_connection_gets_the_next_request_on_another(mode):
    with scene(0, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        target.close_all()
        wait_until(lambda: not held(service))
        assert al.get(b"secret") == (401, b"")
        al.sign_on()
        assert target.peak == 1


@MODES
def test_end_that_the_loop_has_not_seen_is_seen_before_the_next_request(mode):
    """The target's FIN and the client's request come in one turn of the loop."""
    with scene(0, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        for _ in range(20):
            target.close_all()
            assert al.get(b"x") == (200, b"nobody x")
            al.sign_on()


@MODES
def test_private_connection_ends_before_the_target_ends_it(mode, caplog):
    caplog.set_level(logging.INFO)
    extra = b"Keep-Alive: timeout=1\r\n"
    with (
        scene(0, extra, **mode, **LONG) as (_, service),
        NtlmClient(service.address, b"al") as al,
    ):
        al.sign_on()
        wait_until(lambda: not held(service), 0.9)
    assert "idle, and the target keeps it for 1 s" in caplog.text


def test_keep_alive_max_holds_on_a_private_connection():
    with scene(0, b"Keep-Alive: max=2\r\n", **LONG) as (target, service):
        with NtlmClient(service.address, b"al") as al:
            al.begin()  # two more
            assert al.finish() == (200, b"al hello")
            assert al.get(b"x") == (200, b"al x")
            assert al.get(b"y") == (200, b"nobody y")
        assert target.peak == 1


def test_private_connection_rests_before_its_clients_next_request():
    with (
        scene(0, request_delay="100ms", **LONG) as (target, service),
        NtlmClient(service.address, b"al") as al,
    ):
        began = monotonic()
        al.sign_on()
        al.put(b"a")
        al.put(b"b")
        assert (al.take(), al.take()) == ((200, b"al a"), (200, b"al b"))
        assert monotonic() - began > 0.29
        assert target.accepted == 1


def test_request_that_waits_for_a_rest_goes_elsewhere_when_the_connection_ends():
    with (
        scene(0, request_delay="300ms", **LONG) as (target, service),
        NtlmClient(service.address, b"al") as al,
    ):
        al.begin()
        al.put(b"a")
        wait_until(lambda: service.pool._private._parked)
        target.close_all()
        assert al.take() == (200, b"nobody a")
        assert not service.pool._private._parked


@pytest.mark.parametrize("how", ["fin", "reset"])
def test_client_that_vanishes_while_its_request_waits_for_a_rest_frees_all(how):
    with scene(1, request_delay="200ms", **LONG) as (target, service):
        al = NtlmClient(service.address, b"al")
        al.begin()
        al.put(b"a")
        wait_until(lambda: service.pool._private._parked)
        al.vanish(how)
        service.wait_clients(0)
        assert (b"a" in target.requests) == (how == "fin")  # that is half a close: it waits for its answer


def test_request_that_waits_for_a_rest_has_the_queue_timeout():
    with (
        scene(0, request_delay="300ms", queue_timeout="50ms", **LONG) as (_, service),
        NtlmClient(service.address, b"al") as al,
    ):
        al.begin()
        assert al.get(b"a")[0] == 503
        gevent.sleep(0.3)
        assert al.finish() == (200, b"al hello")


@MODES
def test_private_connection_of_some_age_is_replaced(mode):
    with scene(0, upstream_max_age="200ms", **mode, **LONG) as (target, service):
        with NtlmClient(service.address, b"al") as al:
            al.sign_on()
            wait_until(lambda: b"al" not in target.users, 2)
            assert al.get(b"a") == (200, b"nobody a")
        assert target.peak == 1


@MODES
@pytest.mark.parametrize(
    "fields",
    [
        b"",
        b"Authorization: Basic bnRsbTp4\r\n",
        b"Authorization: Digest username=ntlm\r\n",
        b"Authorization: Bearer Negotiate\r\n",
    ],
)
def test_other_schemes_and_offers_make_nothing_private(mode, fields):
    with scene(0, **mode, **LONG) as (_, service), Client(service.address, HTTP) as client:
        client.send_raw(b"GET /secret HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")
        assert HTTP.read(client).startswith(b"HTTP/1.1 401 ")
        assert held(service) == 0
        assert service.is_whole


@MODES
def test_declined_credentials_cost_the_connection_and_nobody_waits(mode):
    with (
        scene(1, **mode, **LONG) as (target, service),
        NtlmClient(service.address, b"al") as al,
        NtlmClient(service.address) as other,
    ):
        assert al.get(b"refused", credentials(b"al")) == (401, b"")
        assert held(service) == 0
        assert other.get(b"x") == (200, b"nobody x")
        assert (target.accepted, target.refused) == (2, 0)


@MODES
def test_credentials_declined_on_a_private_connection_leave_it_private(mode):
    with scene(1, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        assert al.get(b"refused", credentials(b"al")) == (401, b"")
        assert al.get(b"x") == (200, b"al x")
        assert target.accepted == 1


@MODES
def test_negotiate_in_one_leg_makes_the_connection_private(mode):
    """Kerberos: the first request has all, and the target's answer to it has a token or none."""

    def behaviour(connection, request):
        if b"Authorization: negotiate" in request:
            connection.user = b"krb"
        return (reply(b"200 OK", getattr(connection, "user", b"nobody")),)

    with (
        Target(behaviour, HTTP) as target,
        serving(target, **mode, private_timeout="50ms") as service,
        NtlmClient(service.address) as al,
        NtlmClient(service.address) as other,
    ):
        assert al.get(b"a", b"negotiate YII=")[1] == b"krb"
        assert other.get(b"a")[1] == b"nobody"


def test_answer_that_binds_with_others_in_flight_costs_them_the_connection_only():
    """A step of a handshake that nobody began, as far as gmux can see."""
    gate = gevent.lock.Semaphore(0)

    def behaviour(connection, request):
        path = HTTP.payload(request)
        if path == b"token":
            connection.user = b"somebody"
            return (hold(gate), reply(b"200 OK", b"token", b"WWW-Authenticate: NTLM abc\r\n"))
        if path == b"warm":
            return (reply(b"200 OK", path),)
        return (reply(b"200 OK", getattr(connection, "user", b"nobody") + b" " + path),)

    with Target(behaviour, HTTP) as target, serving(target, **PIPELINED, **LONG) as service, ExitStack() as stack:
        clients = [stack.enter_context(NtlmClient(service.address)) for _ in range(3)]
        warm(service, *clients[:2])
        clients[0].put(b"token")
        wait_until(lambda: b"token" in target.requests)
        for client in clients[1:]:
            client.put(b"x")
        wait_until(lambda: any(u.load == 3 for u in service.pool._upstreams))
        gate.release()
        assert clients[0].take() == (200, b"token")
        assert [client.take() for client in clients[1:]] == [(200, b"nobody x")] * 2
        assert target.peak == 1


def test_bytes_behind_an_answer_that_binds_end_the_connection():
    def behaviour(connection, request):
        return (reply(b"200 OK", b"a"), reply(b"200 OK", b"b")) if b"NTLM" in request else (reply(b"200 OK", b"c"),)

    for mode in (STRICT, PIPELINED):
        with (
            Target(behaviour, HTTP) as target,
            serving(target, **mode, **LONG) as service,
            NtlmClient(service.address) as al,
        ):
            al.put(b"x", b"NTLM abc")
            assert al.take() == (200, b"a")
            assert al.get(b"y") == (200, b"c")


@MODES
def test_handshake_is_never_sent_twice(mode):
    """A connection that was used before closes on the last leg; a GET is sent again, but not with these credentials."""

    def behaviour(connection, request):
        if b"Authorization: " in request:
            connection.close()
            return ()
        return (reply(b"200 OK", b"ok"),)

    with Target(behaviour, HTTP) as target, serving(target, **mode, **LONG) as service:
        with NtlmClient(service.address, b"al") as al:
            assert al.get(b"a") == (200, b"ok")
            assert al.get(b"b", credentials(b"al"))[0] == 502
        assert target.times()[b"b"] == 1


@MODES
def test_drain_ends_private_connections(mode):
    with scene(0, **mode, **LONG) as (target, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        began = monotonic()
        assert service.route.drain(20)
        assert monotonic() - began < 10
        assert target.users == set()
        with pytest.raises(Closed):
            al.get(b"x")


def test_access_log_and_trace_know_of_private_connections(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "access"
    settings = {"access_log": str(path), "verbose": "true"} | LONG
    with scene(0, **settings) as (_, service), NtlmClient(service.address, b"al") as al:
        al.sign_on()
        assert al.get(b"x") == (200, b"al x")
    lines = path.read_text().splitlines()
    assert len(lines) == 3
    assert len({re.search(r'upstream=("[^"]+")', line)[1] for line in lines}) == 1
    assert all(line.endswith("outcome=answered") for line in lines)


@MODES
def test_client_signs_on_while_another_process_asks_for_its_connection(mode, tmp_path):
    gate = Semaphore(0)

    def share(stack: ExitStack) -> Service:
        slots = SharedSlots(Folder(tmp_path), "target", 1, "", LOG)
        return stack.enter_context(serving(target, slots, pool_min="0", private_timeout="300ms", **mode))

    with NtlmTarget(1) as target, ExitStack() as stack:
        one, two = share(stack), share(stack)
        al = stack.enter_context(NtlmClient(one.address, b"al"))
        other = stack.enter_context(NtlmClient(two.address))
        assert al.get(b"x") == (200, b"nobody x")
        target.behaviour = lambda connection, request: (hold(gate), *authenticating(connection, request))
        al.put(b"", b"NTLM " + TYPE_1)
        wait_until(lambda: one.pool._answering)
        other.put(b"y")
        gevent.sleep(2 * SLICE)  # by then its share is another's, if it can do without
        wait_until(one.pool._slots.has_asks)
        for _ in range(3):
            gate.release()
        assert HTTP.read(al).startswith(b"HTTP/1.1 401 ")
        assert al.finish() == (200, b"al hello")
        assert other.take() == (200, b"nobody y")
        assert (target.peak, target.refused) == (1, 0)


@pytest.mark.parametrize("mode", [[], ["--pipeline", "4"]], ids=["strict", "pipelined"])
def test_processes_that_share_a_budget_keep_private_connections_to_themselves(mode, tmp_path):
    words = ("--runtime-dir", str(tmp_path / "run"), "--private-timeout", "300ms", *mode)
    (tmp_path / "run").mkdir(mode=0o700)
    with ExitStack() as stack:
        target = stack.enter_context(NtlmTarget(1))
        one, two = (stack.enter_context(Server(target, *words, pool_min="0")) for _ in range(2))
        al = stack.enter_context(NtlmClient(one.address, b"al"))
        other = stack.enter_context(NtlmClient(two.address))
        al.sign_on()
        other.put(b"x")
        for _ in range(20):  # longer than others wait who ask for a connection that is idle
            assert al.get(b"y") == (200, b"al y")
            gevent.sleep(0.02)
        assert other.take() == (200, b"nobody x")
        assert (target.peak, target.refused) == (1, 0)


def test_reload_ends_private_connections_and_keeps_their_clients(tmp_path):
    with NtlmTarget(1) as target, Server(target, private_timeout="1h") as server:
        with NtlmClient(server.address, b"al") as al:
            al.sign_on()
            (old,) = server.workers()
            server.signal(1)
            wait_until(lambda: server.workers() and old not in server.workers())
            assert al.get(b"secret") == (401, b"")
            al.sign_on()
        assert target.refused == 0


# Real peers.


def curl(address, *words: str) -> bytes:
    fixed = ["-q", "--silent", "--show-error", "--noproxy", "*", "--max-time", "30"]
    url = "http://{}:{}/secret".format(*address)
    done = subprocess.run([program("curl"), *fixed, *words, url + "1", url + "2"], capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@MODES
def test_curl_signs_on_by_ntlm_while_others_ask(mode):
    with scene(1, **mode, private_timeout="100ms") as (target, service):
        is_over = False
        wrong = []

        def hammer() -> None:
            with NtlmClient(service.address) as client:
                while not is_over:
                    if (got := client.get(b"x")) != (200, b"nobody x"):
                        wrong.append(got)

        job = gevent.spawn(hammer)
        for name in ("al", "bob"):
            expected = f"{name} secret1{name} secret2".encode()
            assert curl(service.address, "--ntlm", "-u", f"{name}:password") == expected
        is_over = True
        job.join()
        assert not wrong
        assert (target.peak, target.refused) == (1, 0)
