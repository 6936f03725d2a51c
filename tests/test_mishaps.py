"""What goes wrong around a service while it runs, or as it starts: it goes on, or says one line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.clients import Client
from tests.support.service import ROOT, Server, title
from tests.support.target import Target
from tests.support.wait import wait_until


def serves(server: Server) -> bool:
    with Client(server.address) as client:
        return client.outcome(b"request") == "answered"


def start(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gmux", "server", "-l", "127.0.0.1:0", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def assert_one_line(done: subprocess.CompletedProcess[str], code: int, said: str) -> None:
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr


# While it runs.


def test_folder_of_the_pid_file_is_gone_upgrade_goes_on(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Target() as target, Server(target, pid=str(folder / "pid")) as server:
        server.signal(signal.SIGUSR2)
        wait_until(lambda: server.upgrades() and server.workers(server.upgrades()[0]))
        (new,) = server.upgrades()
        shutil.rmtree(folder)
        server.signal(signal.SIGTERM)
        server.wait_master()
        wait_until(lambda: server.said("the pid file stays as it is"))
        wait_until(lambda: title(new) == "gmux: master [gmux]")
        assert serves(server)


def test_runtime_folder_is_gone_reload_makes_it_anew(tmp_path):
    folder = tmp_path / "run"
    with Target() as target, Server(target, runtime_dir=str(folder)) as server:
        assert serves(server)
        before = server.workers()
        shutil.rmtree(folder)
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.said("reloaded"))
        assert not set(before) & set(server.workers())
        assert serves(server)


def test_runtime_folder_of_others_reload_is_refused_and_the_service_goes_on(tmp_path):
    folder = tmp_path / "run"
    with Target() as target, Server(target, runtime_dir=str(folder)) as server:
        assert serves(server)
        before = server.workers()
        folder.chmod(0o777)
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.said("the configuration is not changed"))
        assert server.said("others may write to it")
        assert server.workers() == before
        assert serves(server)


def test_worker_that_cannot_start_after_one_that_served_is_tried_again(tmp_path):
    folder = tmp_path / "run"
    with Target() as target, Server(target, runtime_dir=str(folder)) as server:
        assert serves(server)
        (worker,) = server.workers()
        shutil.rmtree(folder)
        folder.write_text("in its way")
        os.kill(worker, signal.SIGKILL)
        wait_until(lambda: server.said("cannot start"))
        folder.unlink()
        wait_until(server.workers)
        wait_until(lambda: serves(server))


@pytest.fixture
def fork(tmp_path):
    """A file: as long as it is there, processes started with the variables of `forkless` cannot fork.

    Each attempt makes it a byte longer.
    """
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, os\nreal = os.fork\n"
        "def fork():\n"
        f"    try: file = os.open({str(tmp_path / 'full')!r}, os.O_WRONLY | os.O_APPEND)\n"
        "    except FileNotFoundError: return real()\n"
        "    os.write(file, b'.')\n"
        "    os.close(file)\n"
        "    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))\n"
        "os.fork = fork\n"
    )
    return tmp_path / "full"


def forkless(fork: Path) -> dict[str, dict[str, str]]:
    return {"env": os.environ | {"PYTHONPATH": f"{fork.parent}:{ROOT}"}}


def test_master_that_cannot_fork_leaks_nothing_says_so_once_and_hears_signals(fork, tmp_path):
    folder = tmp_path / "run"

    def held() -> tuple[int, int]:
        return len(os.listdir(f"/proc/{server.pid}/fd")), len(list(folder.glob("listener-*")))

    with Target() as target, Server(target, runtime_dir=str(folder), process=forkless(fork), pool_size="3") as server:
        assert serves(server)
        descriptors = held()[0]
        fork.touch()
        os.kill(server.workers()[0], signal.SIGKILL)
        wait_until(lambda: server.said("cannot start a worker: Resource temporarily unavailable"))
        server.signal(signal.SIGTTIN)
        server.signal(signal.SIGUSR2)
        wait_until(lambda: server.said("the upgrade failed: "))
        attempts = fork.stat().st_size
        wait_until(lambda: fork.stat().st_size >= attempts + 2, what="two more attempts")
        assert held()[0] < descriptors
        assert held()[1] <= 1  # that of the worker that was killed
        assert sum("cannot start" in line for line in server.log) == 1
        fork.unlink()
        wait_until(lambda: len(server.workers()) == 2)
        wait_until(lambda: serves(server))


def test_reload_that_cannot_start_a_worker_says_so_at_once_and_hears_signals(fork):
    with Target() as target, Server(target, process=forkless(fork), pool_size="3", workers="2") as server:
        before = wait_until(lambda: len(server.workers()) == 2 and server.workers())
        fork.touch()
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.said("the reload is not complete: old workers go on"), 5)
        server.signal(signal.SIGUSR2)
        wait_until(lambda: server.said("the upgrade failed: "), 5)
        assert serves(server)
        assert server.workers() == before
        fork.unlink()
        wait_until(lambda: server.said("reloaded"))
        assert len(server.workers()) == 2
        assert not set(before) & set(server.workers())
        fork.touch()
        server.signal(signal.SIGHUP)
        wait_until(lambda: sum("the reload is not complete" in line for line in server.log) == 2, 5)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0


def test_mode_of_a_unix_socket_is_changed_a_reload_says_that_it_stays(tmp_path):
    path, file = tmp_path / "sock", tmp_path / "gmux.toml"
    with Target() as target:
        where = f"{target.server_host}:{target.server_port}"
        text = f'[[route]]\nlisten = "unix:{path}"\ntarget = "{where}"\nlisten-mode = "%s"\n'
        file.write_text(text % "0666")
        with Server(target, config=str(file), listen="", target="", protocol="") as server:
            file.write_text(text % "0600")
            server.signal(signal.SIGHUP)
            wait_until(lambda: server.said("reloaded"))
            assert server.said(f"mode and owner of {path} stay as they are: to change them takes a restart")
            assert path.stat().st_mode & 0o777 == 0o666


# As it starts.


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN])
def test_signal_as_soon_as_there_is_a_port_does_not_end_it(number):
    with Target() as target, Server(target, "-q") as server:
        # A quiet one is known by its port, which is open before its master follows signals.
        server.signal(number)
        wait_until(lambda: serves(server))


def test_pid_file_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pid")
    done = start("-t", "embedded", "--pid", str(tmp_path / "pid"))
    assert_one_line(done, 1, "it is not a regular file")


def test_pid_file_with_an_absurd_number_is_written_anew(tmp_path):
    pid_file = tmp_path / "pid"
    pid_file.write_text("99999999999999999999\n")
    with Target() as target, Server(target, pid=str(pid_file)) as server:
        wait_until(lambda: pid_file.read_text() == f"{server.pid}\n")


@pytest.mark.parametrize("spec", ["/dev/zero", "/proc/self/fd/0"])
def test_spec_that_has_no_end_is_refused(spec):
    assert_one_line(start("-p", "iso8583", "--correlation", "key", "--spec", spec), 2, "--spec: ")


def test_spec_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "spec.json").write_text("[" * 100_000)
    done = start("-p", "iso8583", "--correlation", "key", "--spec", str(tmp_path / "spec.json"))
    assert_one_line(done, 2, "--spec: ")


def test_wrong_flag_with_an_error_output_that_is_full_has_its_code():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "gmux", "server", "--pool-size", "0"]
        assert subprocess.run(command, cwd=ROOT, stderr=full, timeout=60).returncode == 2


def test_daemon_started_with_descriptors_closed_serves_and_logs(tmp_path):
    pid_file, log_file = tmp_path / "pid", tmp_path / "log"
    with ExitStack() as stack:
        words = (
            f"-t embedded -l 127.0.0.1:0 --daemon --pid {pid_file} --log-file {log_file} --runtime-dir {tmp_path}/run"
        )
        command = f"exec {sys.executable} -m gmux server {words} <&- >&- 2>&-"
        subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=60, check=True)
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip())
        master = int(pid_file.read_text())
        stack.callback(wait_until, lambda: not title(master))
        stack.callback(os.kill, master, signal.SIGTERM)
        wait_until(lambda: "listening on" in log_file.read_text())
