"""The flags of the processes: how many there are, who they are, and where they run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gmux import app
from gmux.errors import StartError
from gmux.net import format_address
from tests.support.clients import Client
from tests.support.service import ROOT, Server, title
from tests.support.settings import read
from tests.support.target import Target, closed_port
from tests.support.wait import wait_until

#: A user that every Linux machine has.
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start workers as another user")


def status(pid: int, field: str) -> list[int]:
    """The numbers of a line in the status of a process: effective ones are the second."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return [int(word, 8 if field == "Umask" else 10) for word in line.split()[1:]]


def the_worker(server: Server) -> int:
    """The one worker, when it serves: until then it is as the master is."""
    wait_until(lambda: server.said("new target connection"), what="a worker that serves")
    (worker,) = server.workers()
    return worker


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gmux", "server", "-p", "echo", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_workers_are_so_many():
    with Target(limit=3) as target, Server(target, workers="3", pool_size="3") as server:
        wait_until(lambda: len(server.workers()) == 3)
        with Client(server.address) as client:
            assert client.ask(b"hello") == b"hello"
        # One that was just forked has its master's for a moment.
        wait_until(lambda: {title(pid) for pid in server.workers()} == {"gmux: worker [gmux]"})
        assert not target.refused


def test_worker_timeout_over_hanging_worker_is_replaced():
    with Target() as target, Server(target, worker_timeout="1s") as server:
        worker = the_worker(server)
        with Client(server.address) as client:
            assert client.ask(b"before") == b"before"
            os.kill(worker, signal.SIGSTOP)
            wait_until(lambda: server.said(f"worker {worker} gives no sign of life: it is replaced"))
            wait_until(lambda: server.workers() not in ([], [worker]))
        with Client(server.address) as client:
            assert client.ask(b"after") == b"after"


def test_worker_timeout_not_over_worker_that_is_busy_and_well_stays():
    with Target() as target, Server(target, worker_timeout="1s") as server:
        worker = the_worker(server)
        files = [link for link in Path(f"/proc/{worker}/fd").iterdir() if "wgunicorn-" in os.readlink(link)]
        # Longer than the timeout, by the worker's own signs of life.
        first = files[0].stat().st_mtime
        wait_until(lambda: files[0].stat().st_mtime > first + 2)
        assert server.workers() == [worker]


def test_name_is_in_the_titles():
    with Target() as target, Server(target, name="bank-1") as server:
        assert title(the_worker(server)) == "gmux: worker [bank-1]"
        assert title(server.pid) == "gmux: master [bank-1]"


def test_pid_is_written_and_removed_and_a_second_one_does_not_start(tmp_path):
    file = tmp_path / "gmux.pid"
    with Target() as target, Server(target, pid=str(file)) as server:
        wait_until(file.exists)
        assert file.read_text() == f"{server.pid}\n"
        done = run("-l", "127.0.0.1:0", "--pid", str(file))
        assert done.returncode == 1
        assert done.stderr == f"gmux: already running as process {server.pid}, says the file of --pid, {file}\n"
        assert server.stop() == 0
    assert not file.exists()


def test_pid_of_a_process_that_is_gone_is_written_over(tmp_path):
    file = tmp_path / "gmux.pid"
    gone = subprocess.Popen(["true"])
    gone.wait()
    file.write_text(f"{gone.pid}\n")
    with Target() as target, Server(target, pid=str(file)) as server:
        wait_until(lambda: file.read_text() == f"{server.pid}\n")


def test_pid_in_a_folder_that_is_not_there_is_an_error(tmp_path):
    done = run("-l", "127.0.0.1:0", "--pid", f"{tmp_path}/no/gmux.pid")
    assert done.returncode == 1
    assert done.stderr.startswith(f"gmux: cannot write the file of --pid, {tmp_path}/no/gmux.pid: ")
    assert done.stderr.count("\n") == 1


def test_daemon_runs_in_the_background_until_its_pid_gets_term(tmp_path):
    file, log = tmp_path / "gmux.pid", tmp_path / "gmux.log"
    address = closed_port()
    with Target() as target:
        where = format_address((target.server_host, target.server_port))
        done = run(
            *("-l", format_address(address), "-t", where),
            *("--daemon", "--pid", str(file), "--log-file", str(log), "--umask", "027"),
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_until(file.exists)
        pid = int(file.read_text())
        try:
            with Client(address) as client:
                assert client.ask(b"hello") == b"hello"
            assert os.getsid(pid) != os.getsid(0)
            assert status(pid, "Umask") == [0o027]
            assert os.readlink(f"/proc/{pid}/fd/2") == "/dev/null"
        finally:
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not file.exists())
        wait_until(lambda: not title(pid))
    assert "the master is stopping" in log.read_text()


def test_daemon_that_cannot_start_says_so_and_exits_1():
    with Target() as target:
        taken = format_address((target.server_host, target.server_port))
        done = run("-l", taken, "--daemon")
    assert done.returncode == 1
    assert done.stderr == f"gmux: cannot listen on {taken}: Address already in use\n"


@pytest.fixture
def open_folder():
    """A folder that any user can go to: those of pytest are for the user that runs it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@as_root
def test_user_is_that_of_the_workers_with_its_own_groups(open_folder):
    folder = open_folder / "run"
    with Target() as target, Server(target, "--user", "nobody", runtime_dir=str(folder)) as server:
        worker = the_worker(server)
        assert status(worker, "Uid") == [NOBODY] * 4
        assert status(worker, "Gid") == [NOBODY] * 4
        assert 0 not in status(worker, "Groups")
        assert status(server.pid, "Uid") == [0] * 4
        assert (folder.stat().st_uid, stat.S_IMODE(folder.stat().st_mode)) == (NOBODY, 0o700)
        with Client(server.address) as client:
            assert client.ask(b"hello") == b"hello"
        # Signs of life and a reload pass from one user to the other.
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.said("reloaded"))


@as_root
def test_user_without_a_name_is_an_error(tmp_path):
    done = run("-l", "127.0.0.1:0", "--user", "54321", "--runtime-dir", f"{tmp_path}/run")
    assert (done.returncode, done.stderr) == (1, "gmux: --user: 54321 is no user of this machine\n")


@pytest.mark.parametrize("setting", ["user", "group"])
def test_user_or_group_of_others_is_for_root_alone(monkeypatch, setting):
    """In process: the tests may run as root."""
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    with pytest.raises(StartError, match="only root can start workers as another user or group"):
        app.find_owner(read({setting: "1"}))


@as_root
def test_group_is_that_of_the_workers(tmp_path):
    with Target() as target, Server(target, "--group", "1", runtime_dir=str(tmp_path / "run")) as server:
        worker = the_worker(server)
        assert status(worker, "Uid") == [0] * 4
        assert status(worker, "Gid") == [1] * 4


def test_umask_is_that_of_master_and_workers():
    with Target() as target, Server(target, umask="0137") as server:
        assert status(the_worker(server), "Umask") == status(server.pid, "Umask") == [0o137]


def test_chdir_is_the_folder_of_master_and_workers(tmp_path):
    with Target() as target, Server(target, chdir=str(tmp_path), pid="gmux.pid") as server:
        for pid in (server.pid, the_worker(server)):
            assert os.readlink(f"/proc/{pid}/cwd") == str(tmp_path)
        wait_until((tmp_path / "gmux.pid").exists)


def test_runtime_dir_has_the_slots_and_is_made(tmp_path):
    folder = tmp_path / "run"
    with Target() as target, Server(target, runtime_dir=str(folder)) as server:
        the_worker(server)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert list(folder.iterdir())


def test_runtime_dir_that_others_may_write_to_is_an_error(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    done = run("-l", "127.0.0.1:0", "--runtime-dir", str(folder))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "others may write to it" in done.stderr
