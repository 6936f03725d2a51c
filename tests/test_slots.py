"""Slots hold the budget over processes, whatever becomes of them; the folder they lie in is nobody else's."""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import gevent
import pytest

from gmux import slots
from gmux.errors import ConnectError, ConnectTimeout, StartError
from gmux.slots import FileSlots, runtime_dir

LOG = logging.getLogger("gmux.test")
TARGET = "10.0.0.1:8583"

HOLDER = """
import logging, sys
from pathlib import Path
from gmux.slots import FileSlots

slots = FileSlots(Path(sys.argv[1]), sys.argv[2], 1, logging.getLogger())
held = slots.acquire(0)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the only slot of TARGET."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path), TARGET]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_slots_are_as_many_as_the_pool_is_large(tmp_path):
    keeper = FileSlots(tmp_path, TARGET, 3, LOG)
    held = [keeper.acquire(0) for _ in range(3)]
    with pytest.raises(ConnectTimeout):
        keeper.acquire(0)
    held[1].release()
    held[1] = keeper.acquire(0)
    with pytest.raises(ConnectTimeout):
        keeper.acquire(0)
    for slot in held:
        slot.release()


def test_slots_of_one_target_are_shared_and_of_two_are_not(tmp_path):
    held = FileSlots(tmp_path, TARGET, 1, LOG).acquire(0)
    with pytest.raises(ConnectTimeout):
        FileSlots(tmp_path, TARGET, 1, LOG).acquire(0)
    FileSlots(tmp_path, "10.0.0.2:8583", 1, LOG).acquire(0).release()
    held.release()


def test_slot_of_another_process_is_refused_and_its_holder_named(tmp_path, holder):
    with pytest.raises(ConnectTimeout, match=f"held by another gmux, process {holder.pid}$"):
        FileSlots(tmp_path, TARGET, 1, LOG).acquire(0)


def test_slot_of_a_killed_process_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    FileSlots(tmp_path, TARGET, 1, LOG).acquire(0).release()


def test_slot_is_waited_for_until_its_holder_is_gone(tmp_path, holder, caplog):
    caplog.set_level(logging.INFO, LOG.name)
    keeper = FileSlots(tmp_path, TARGET, 1, LOG)
    waiter = gevent.spawn(keeper.acquire, 30)
    gevent.idle()  # the waiter runs, finds no slot and waits
    assert not waiter.ready()
    holder.kill()
    holder.wait(30)
    waiter.get(timeout=30).release()
    told = [r.getMessage() for r in caplog.records]
    assert told == [f"waiting for a connection to the target held by another gmux, process {holder.pid}"]


def test_slot_that_does_not_become_free_is_waited_for_no_longer_than_allowed(tmp_path):
    keeper = FileSlots(tmp_path, TARGET, 1, LOG)
    held = keeper.acquire(0)
    with gevent.Timeout(30), pytest.raises(ConnectTimeout):
        keeper.acquire(0.05)
    held.release()


def test_slot_is_not_inherited_by_a_program_that_gmux_starts(tmp_path):
    keeper = FileSlots(tmp_path, TARGET, 1, LOG)
    held = keeper.acquire(0)
    words = [sys.executable, "-c", "print('runs', flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        # Popen may return an instant before the kernel closes what the program does not inherit.
        assert child.stdout.readline() == b"runs\n"
        held.release()
        try:
            keeper.acquire(0).release()
        finally:
            child.communicate(b"\n", timeout=30)


def test_slot_file_that_is_a_link_is_not_followed(tmp_path):
    keeper = FileSlots(tmp_path / "slots", TARGET, 1, LOG)
    (tmp_path / "slots").mkdir()
    slot = keeper.acquire(0)
    [path] = (tmp_path / "slots").iterdir()
    slot.release()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path.symlink_to(victim)
    with pytest.raises(ConnectError, match="cannot take a slot"):
        keeper.acquire(0)
    assert victim.read_text() == "precious"


def test_slot_in_a_folder_that_is_gone_raises_connect_error(tmp_path):
    with pytest.raises(ConnectError, match="cannot take a slot"):
        FileSlots(tmp_path / "missing", TARGET, 1, LOG).acquire(0)


# The runtime folder.


@pytest.fixture
def base(monkeypatch, tmp_path):
    """The folder in which the runtime folder `gmux` is made, also where the tests run as root."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(slots, "Path", lambda *p: tmp_path / "gmux" if p == ("/run/gmux",) else Path(*p))
    return tmp_path


def test_runtime_folder_is_made_for_its_user_alone(base):
    path = runtime_dir()
    assert path == base / "gmux"
    assert path.stat().st_mode & 0o777 == 0o700
    assert runtime_dir() == path


def test_runtime_folder_under_a_lax_umask_is_for_its_user_alone(base):
    before = os.umask(0)
    try:
        path = runtime_dir()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_runtime_folder_that_others_may_write_to_is_refused(base, mode):
    (base / "gmux").mkdir()
    (base / "gmux").chmod(mode)
    with pytest.raises(StartError, match="others may write to it"):
        runtime_dir()


def test_runtime_folder_of_another_user_is_refused(base, monkeypatch):
    (base / "gmux").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(StartError, match="cannot use the runtime folder"):
        runtime_dir()


def test_runtime_folder_that_is_a_link_is_refused(base):
    (base / "elsewhere").mkdir(mode=0o700)
    (base / "gmux").symlink_to(base / "elsewhere")
    with pytest.raises(StartError, match="cannot use the runtime folder"):
        runtime_dir()


def test_runtime_folder_that_is_a_file_is_refused(base):
    (base / "gmux").write_text("")
    with pytest.raises(StartError, match=r"cannot use the runtime folder .*File exists"):
        runtime_dir()


def test_runtime_folder_without_a_session_is_named_after_its_user(base, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    # The folder belongs to the one who runs the tests, so it is refused; the error tells which it was.
    with pytest.raises(StartError, match=str(base / "gmux-4321")):
        runtime_dir()


def test_runtime_folder_of_root_is_in_run(monkeypatch):
    made = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: made.append(path))
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result((0o40700, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
    assert runtime_dir() == Path("/run/gmux")
    assert made == [Path("/run/gmux")]


def test_slot_given_back_leaves_no_file(tmp_path):
    FileSlots(tmp_path, TARGET, 1, LOG).acquire(0).release()
    assert list(tmp_path.iterdir()) == []


def test_slot_file_removed_while_it_was_opened_is_not_taken_for_the_slot(tmp_path, monkeypatch):
    """Who opened the file just before its owner removed it locks a file that has no name: two would hold one slot."""
    keeper = FileSlots(tmp_path, TARGET, 1, LOG)
    first = keeper.acquire(0)
    lock = fcntl.flock

    def release_first(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.release()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", release_first)
    with pytest.raises(ConnectTimeout):
        keeper.acquire(0)
    keeper.acquire(0).release()
