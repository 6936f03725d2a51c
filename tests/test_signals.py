"""Each signal, sent to the real service while clients ask."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import termios
from contextlib import ExitStack, contextmanager

import gevent
import pytest
from gevent.lock import Semaphore

from gmux.master import in_effect
from gmux.net import format_address
from tests.support.clients import Client
from tests.support.load import Load
from tests.support.service import Server, title
from tests.support.target import Target, answer, closed_port, hold
from tests.support.wait import wait_until

#: Without a terminal that could send WINCH.
ALONE = {"start_new_session": True}


@contextmanager
def loaded(*words: str, **settings):
    """A server, its target, and clients that ask."""
    with ExitStack() as stack:
        target = stack.enter_context(Target(limit=int(settings.get("pool_size", 1))))
        server = stack.enter_context(Server(target, *words, process=ALONE, **settings))
        yield server, target, stack.enter_context(Load(server.address))
        assert not target.refused


def wait_said(server: Server, text: str, times: int = 1) -> None:
    wait_until(lambda: sum(text in line for line in server.log) >= times, what=f"in the log: {text}")


def wait_workers(server: Server, number: int) -> list[int]:
    wait_until(lambda: len(server.workers()) == number, what=f"{number} workers: {server.log[-9:]}")
    return server.workers()


# The end.


def test_term_under_load_answers_or_closes_and_frees_the_port():
    with loaded() as (server, _, load):
        server.signal(signal.SIGTERM)
        load.wait_end()
        assert server.wait() == 0
        assert server.said("the master is stopping")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT])
def test_stop_at_once_under_load_gives_no_wrong_answer(number):
    with loaded() as (server, _, load):
        server.signal(number)
        load.wait_end()
        assert server.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_stop_during_a_reload_does_not_wait_for_the_reload(number):
    gate = Semaphore(0)
    with Target((hold(gate), answer)) as target, Server(target, graceful_timeout="10m") as server:
        with Client(server.address) as client:
            client.send(b"request")
            wait_until(lambda: target.requests)
            server.signal(signal.SIGHUP)
            wait_said(server, "started", 2)
            server.signal(number)
            wait_said(server, "the master is stopping")
            gate.release()
        assert server.wait() == 0


def test_hups_that_wait_are_one_and_a_stop_comes_before_them():
    """A script that sends them in a loop would otherwise keep the service from ending for as many reloads."""
    with Target() as target, Server(target) as server:
        wait_said(server, "new target connection")
        for _ in range(50):
            server.signal(signal.SIGHUP)
            gevent.sleep(0.001)  # or the kernel makes one of them
        wait_said(server, "reloaded")
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        started = sum("started" in line for line in server.log)
        assert started <= 10
        stopping = next(at for at, line in enumerate(server.log) if "the master is stopping" in line)
        assert not any("started" in line for line in server.log[stopping:])
        assert target.peak == 1


@pytest.mark.parametrize(
    ("signals", "left"),
    [
        ([], []),
        ([signal.SIGHUP] * 3, [signal.SIGHUP]),
        ([signal.SIGTTIN, signal.SIGTTIN], [signal.SIGTTIN, signal.SIGTTIN]),
        ([signal.SIGHUP, signal.SIGUSR2, signal.SIGHUP], [signal.SIGHUP, signal.SIGUSR2]),
        ([signal.SIGHUP, signal.SIGTTIN, signal.SIGTERM, signal.SIGHUP], [signal.SIGTERM]),
        ([signal.SIGTERM, signal.SIGQUIT], [signal.SIGTERM, signal.SIGQUIT]),
    ],
)
def test_signals_that_wait_for_the_master(signals, left):
    assert in_effect(signals) == left


# Reload.


def test_hup_under_load_replaces_the_worker_and_loses_no_request():
    with loaded() as (server, _, load):
        before = server.workers()
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        load.wait_answers()
        assert len(server.workers()) == 1
        assert server.workers() != before
        assert not load.cut


def test_hup_brings_back_as_many_workers_as_are_configured():
    with loaded(pool_size="3", workers="2") as (server, _, load):
        server.signal(signal.SIGTTIN)
        wait_workers(server, 3)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        wait_workers(server, 2)
        load.wait_answers()


def test_usr1_under_load_leaves_all_as_it_is():
    with loaded() as (server, _, load):
        before = server.workers()
        server.signal(signal.SIGUSR1)
        load.wait_answers()
        assert server.workers() == before
        assert not load.cut


# Workers.


def test_ttin_adds_workers_up_to_the_size_of_the_pool_and_ttou_removes_all_but_one():
    with loaded(pool_size="2") as (server, _, load):
        server.signal(signal.SIGTTIN)
        wait_workers(server, 2)
        server.signal(signal.SIGTTIN)
        wait_said(server, "TTIN is not followed: 2 workers are as many as --pool-size")
        server.signal(signal.SIGTTOU)
        (left,) = wait_workers(server, 1)
        server.signal(signal.SIGTTOU)
        server.signal(signal.SIGUSR1)  # which comes behind it
        load.wait_answers()
        assert server.workers() == [left]


def test_ttin_with_an_embedded_target_is_not_followed():
    with Server(closed_port(), target="embedded", protocol="echo", pool_size="2") as server:
        wait_workers(server, 1)
        server.signal(signal.SIGTTIN)
        wait_said(server, "TTIN is not followed: the embedded target is inside one worker")
        assert len(server.workers()) == 1


def test_winch_without_a_terminal_ends_the_workers_and_hup_brings_them_back():
    with loaded() as (server, _, load):
        server.signal(signal.SIGWINCH)
        wait_workers(server, 0)
        with Client(server.address) as waiting:
            # The master listens: whoever comes is served later.
            waiting.send(b"waiting")
            server.signal(signal.SIGHUP)
            assert waiting.receive() == b"waiting"
        load.wait_answers()


def test_winch_of_a_terminal_is_not_followed():
    master, terminal = pty.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    try:
        with Target() as target:
            process = {"preexec_fn": take_terminal}
            with Server(target, process=process, pool_size="2") as server, Client(server.address) as client:
                wait_workers(server, 1)
                server.signal(signal.SIGWINCH)
                server.signal(signal.SIGTTIN)
                wait_workers(server, 2)
                assert client.ask(b"still there") == b"still there"
    finally:
        os.close(master)
        os.close(terminal)


# Upgrade.


def upgrade(server: Server) -> int:
    """Send USR2; the new master, when it has a worker."""
    number = len(server.upgrades())
    server.signal(signal.SIGUSR2)
    (new,) = wait_until(lambda: server.upgrades()[number:], what="a new master")
    wait_until(lambda: server.workers(new), what=f"a worker of the new master: {server.log[-9:]}")
    return new


def test_usr2_under_load_old_master_ends_new_one_serves_and_nothing_is_lost(tmp_path):
    file = tmp_path / "gmux.pid"
    with loaded(pid=str(file)) as (server, _, load):
        new = upgrade(server)
        assert (int(file.read_text()), int(file.with_suffix(".pid.2").read_text())) == (server.pid, new)
        assert re.fullmatch(r"gmux: master \[gmux.2\]", title(new))
        load.wait_answers()
        server.signal(signal.SIGTERM)
        assert server.wait_master() == 0
        wait_said(server, f"the old master, process {server.pid}, has ended: this one takes its place")
        wait_until(lambda: title(new) == "gmux: master [gmux]")
        assert int(file.read_text()) == new
        assert not file.with_suffix(".pid.2").exists()
        load.wait_answers()
        assert not load.cut
        os.kill(new, signal.SIGTERM)
        load.wait_end()
        assert server.wait() == 0
    assert not file.exists()


def test_usr2_twice_is_not_followed_and_term_to_the_new_master_takes_the_upgrade_back():
    with loaded() as (server, _, load):
        new = upgrade(server)
        server.signal(signal.SIGUSR2)
        wait_said(server, "USR2 is not followed: an upgrade goes on already")
        os.kill(new, signal.SIGUSR2)
        wait_said(server, "USR2 is not followed: the old master of the last upgrade has not ended")
        os.kill(new, signal.SIGHUP)
        wait_said(server, f"HUP is not followed: the old master, process {server.pid}, has not ended")
        os.kill(new, signal.SIGTERM)
        wait_said(server, f"the new master, process {new}, has ended: this one goes on")
        load.wait_answers()
        assert not load.cut
        server.signal(signal.SIGTERM)
        load.wait_end()


def test_usr2_step_by_step_old_workers_are_ended_by_winch_and_called_back_by_hup():
    with loaded() as (server, _, load):
        new = upgrade(server)
        server.signal(signal.SIGWINCH)
        wait_workers(server, 0)
        load.wait_answers()
        server.signal(signal.SIGHUP)
        wait_workers(server, 1)
        os.kill(new, signal.SIGTERM)
        wait_said(server, "this one goes on")
        load.wait_answers()


def test_usr2_that_cannot_start_leaves_the_service_as_it_is(tmp_path):
    """The folder in which gmux was started is gone, as after a deployment."""
    folder = tmp_path / "release"
    folder.mkdir()
    file = tmp_path / "gmux.pid"
    with Target() as target:
        process = ALONE | {"cwd": folder}
        with Server(target, process=process, pid=str(file)) as server, Client(server.address) as client:
            wait_workers(server, 1)
            folder.rmdir()
            server.signal(signal.SIGUSR2)
            wait_said(server, "the upgrade failed: ")
            wait_said(server, "this one goes on")
            assert client.ask(b"still there") == b"still there"
            assert int(file.read_text()) == server.pid


def test_usr2_old_master_killed_new_one_takes_its_place():
    with loaded() as (server, _, load):
        new = upgrade(server)
        server.signal(signal.SIGKILL)
        server.wait_master()
        wait_said(server, "this one takes its place")
        load.wait_answers()
        assert server.upgrades() == [new]


# The configuration.


@contextmanager
def configured(tmp_path, text: str):
    """A server with a file, which it serves from, and clients that ask; and a function that writes the file anew.

    In the file TARGET, FREE and TAKEN stand for addresses.
    """
    with ExitStack() as stack:
        target = stack.enter_context(Target())
        taken = stack.enter_context(Target())
        names = {"TARGET": (target.server_host, target.server_port), "FREE": closed_port()}
        names["TAKEN"] = (taken.server_host, taken.server_port)
        file = tmp_path / "gmux.toml"

        def write(text: str) -> None:
            for name, address in names.items():
                text = text.replace(name, f'"{format_address(address)}"')
            file.write_text(text)

        write(text)
        server = stack.enter_context(Server(target, config=str(file), protocol="", target="", listen="", process=ALONE))
        wait_said(server, "worker")
        # The first line may have been there before the second.
        server.address = server.find_address()
        yield server, write, stack.enter_context(Load(server.address)), names


ONE = '[defaults]\ntarget = TARGET\n[[route]]\nname = "one"\nlisten = "127.0.0.1:0"\n'
TWO = '[[route]]\nname = "two"\nlisten = FREE\n'


BAD = {
    "no TOML": ("[defaults", ["gmux.toml:1: this is not TOML"]),
    "two errors": (
        ONE.replace('"one"', '"one"\npool-sice = 2\npool-size = 0'),
        ["gmux.toml:5: pool-sice: is not known: did you mean pool-size?", "gmux.toml:6: pool-size: '0' is not allowed"],
    ),
    "a port in use": (ONE + TWO.replace("FREE", "TAKEN"), ["cannot listen on 127.0.0.1:"]),
    "a pid file that cannot be": (ONE + '[service]\npid = "/nowhere/gmux.pid"\n', ["--pid, /nowhere/gmux.pid"]),
    "a log file that cannot be": (ONE + '[service]\nlog-file = "/nowhere/gmux.log"\n', ["/nowhere/gmux.log"]),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_hup_with_a_bad_configuration_changes_nothing_and_says_why(tmp_path, text, said):
    with configured(tmp_path, ONE) as (server, write, load, _):
        before = server.workers()
        write(text)
        server.signal(signal.SIGHUP)
        wait_said(server, "the configuration is not changed")
        for line in said:
            assert server.said(line)
        load.wait_answers()
        assert not load.cut
        assert server.workers() == before
        # And the next good one is followed.
        write(ONE)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        load.wait_answers()


def test_hup_with_another_route_opens_it_and_without_it_closes_it(tmp_path):
    with configured(tmp_path, ONE) as (server, write, load, names):
        write(ONE + TWO)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        with Client(names["FREE"]) as client:
            assert client.ask(b"by the other") == b"by the other"
        write(ONE)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded", 2)
        with pytest.raises(ConnectionRefusedError):
            Client(names["FREE"])
        load.wait_answers()
        assert not load.cut


def test_hup_with_a_setting_that_takes_a_restart_says_so_and_follows_the_rest(tmp_path):
    with configured(tmp_path, ONE) as (server, write, load, _):
        write(ONE + f'[service]\nchdir = "{tmp_path}"\nname = "other"\n')
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        assert server.said("chdir stays as it is: to change it takes a restart")
        assert os.readlink(f"/proc/{server.pid}/cwd") != str(tmp_path)
        assert title(server.pid) == "gmux: master [other]"
        load.wait_answers()


def test_usr2_with_a_bad_configuration_leaves_the_service_as_it_is(tmp_path):
    with configured(tmp_path, ONE) as (server, write, load, _):
        write("bad")
        server.signal(signal.SIGUSR2)
        wait_said(server, "this one goes on")
        assert server.said("gmux: gmux.toml:1: this is not TOML") or server.said("gmux.toml:1: this is not TOML")
        load.wait_answers()
        assert not load.cut


def test_usr2_with_other_routes_opens_and_closes_them(tmp_path):
    # The last line that tells an address is the clients'.
    with configured(tmp_path, TWO + ONE) as (server, write, load, names):
        write(TWO.replace("FREE", '"127.0.0.1:0"') + ONE)
        upgrade(server)
        server.signal(signal.SIGTERM)
        wait_said(server, "this one takes its place")
        with pytest.raises(ConnectionRefusedError):
            Client(names["FREE"])
        load.wait_answers()
        assert not load.cut


def test_file_of_a_unix_socket_stays_over_reload_and_upgrade_and_goes_at_the_last_stop(tmp_path):
    path = tmp_path / "gmux.sock"
    with Target() as target, Server(target, listen=f"unix:{path}", process=ALONE) as server:
        wait_workers(server, 1)
        server.signal(signal.SIGHUP)
        wait_said(server, "reloaded")
        new = upgrade(server)
        server.signal(signal.SIGTERM)
        wait_said(server, "this one takes its place")
        with Client(str(path)) as client:
            assert client.ask(b"still there") == b"still there"
        os.kill(new, signal.SIGTERM)
        server.wait()
        assert not path.exists()
