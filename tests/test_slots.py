"""Slots hold the budget over processes, whatever becomes of them; the folder they lie in is nobody else's."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux import folder, slot_files
from gmux.errors import ConnectError, StartError
from gmux.folder import runtime_dir
from gmux.slot_files import DEATH_TIMEOUT, MAX_LOOKS, FileSlot, Process, SlotFiles
from tests.support.service import ROOT

TARGET = "10.0.0.1:8583"

HOLDER = """
import sys
from pathlib import Path
from gmux.slot_files import SlotFiles

held = SlotFiles(Path(sys.argv[1]), sys.argv[2], 1).take()
print("held", flush=True)
sys.stdin.read()
"""


def path_of(files: SlotFiles, number: int = 0) -> Path:
    return files.folder / f"{files.name}.{number}"


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
    files = SlotFiles(tmp_path, TARGET, 3)
    held = [files.take() for _ in range(3)]
    assert len(files) == 3
    assert files.take() is None
    held[1].release()
    assert len(files) == 2
    held[1] = files.take()
    assert files.take() is None
    for slot in held:
        slot.release()


def test_slots_of_one_budget_are_shared_and_of_two_are_not(tmp_path):
    held = SlotFiles(tmp_path, TARGET, 1).take()
    assert SlotFiles(tmp_path, TARGET, 1).take() is None
    SlotFiles(tmp_path, "10.0.0.2:8583", 1).take().release()
    held.release()


def test_slots_of_a_pool_that_shrank_are_free_when_fewer_are_held(tmp_path):
    """After a reload the old worker may hold more slots than there shall be."""
    old, new = SlotFiles(tmp_path, TARGET, 4), SlotFiles(tmp_path, TARGET, 2)
    held = [old.take() for _ in range(4)]
    for n in (0, 1, 2):
        assert new.take() is None
        held[n].release()
    # One of the old is left, numbered above those of the new.
    taken = new.take()
    assert taken is not None
    assert new.take() is None
    held[3].release()
    assert new.take() is not None


def test_slots_of_a_larger_pool_whose_process_died_are_free(tmp_path):
    old, new = SlotFiles(tmp_path, TARGET, 4), SlotFiles(tmp_path, TARGET, 2)
    for n in range(4):
        slot = old.take()
        if n != 3:
            os.close(slot.descriptor)  # as when its process died
    assert new.take() is not None
    assert new.take() is None
    assert len(list(tmp_path.iterdir())) == 2


def test_look_for_a_slot_opens_few_files_however_many_there_are(tmp_path, monkeypatch):
    size = 300
    theirs, ours = SlotFiles(tmp_path, TARGET, size), SlotFiles(tmp_path, TARGET, size)
    held = [theirs.take() for _ in range(size)]
    opened, lock = [], slot_files._lock
    monkeypatch.setattr(slot_files, "_lock", lambda path: opened.append(path) or lock(path))
    for _ in range(size // MAX_LOOKS + 1):
        assert ours.take() is None
    assert len(opened) == len(set(opened)) == size  # each once in a round
    opened.clear()
    held[-1].release()
    ours.take()
    assert opened == [held[-1].path]  # what was released has no file
    os.close(held[7].descriptor)  # as when its process died
    opened.clear()
    while ours.take() is None:
        assert len(opened) <= size
    assert ours.holders() == f"another gmux, process {os.getpid()}"


def test_slot_of_another_process_is_refused_and_its_holder_named(tmp_path, holder):
    files = SlotFiles(tmp_path, TARGET, 1)
    assert files.take() is None
    assert files.holders() == f"another gmux, process {holder.pid}"


def test_slot_of_a_killed_process_is_free_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait(30)
    SlotFiles(tmp_path, TARGET, 1).take().release()


def test_slot_is_not_inherited_by_a_program_that_gmux_starts(tmp_path):
    files = SlotFiles(tmp_path, TARGET, 1)
    held = files.take()
    words = [sys.executable, "-c", "print('runs', flush=True); input()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False) as child:
        # Popen may return an instant before the kernel closes what the program does not inherit.
        assert child.stdout.readline() == b"runs\n"
        held.release()
        try:
            files.take().release()
        finally:
            child.communicate(b"\n", timeout=30)


def test_slot_file_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "slots").mkdir()
    files = SlotFiles(tmp_path / "slots", TARGET, 1)
    slot = files.take()
    slot.release()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    slot.path.symlink_to(victim)
    with pytest.raises(ConnectError, match="cannot take a slot"):
        files.take()
    assert victim.read_text() == "precious"


def test_slot_in_a_folder_that_is_gone_raises_connect_error(tmp_path):
    with pytest.raises(ConnectError, match="cannot take a slot"):
        SlotFiles(tmp_path / "missing", TARGET, 1).take()


def test_slot_file_with_garbage_is_a_slot_that_is_taken(tmp_path):
    held = SlotFiles(tmp_path, TARGET, 1).take()
    held.path.write_bytes(b"\xff\xfe")
    files = SlotFiles(tmp_path, TARGET, 1)
    assert files.take() is None
    assert files.holders() == "another gmux"
    held.release()


def test_slot_given_back_leaves_no_file(tmp_path):
    SlotFiles(tmp_path, TARGET, 1).take().release()
    assert list(tmp_path.iterdir()) == []


def test_slot_file_removed_while_it_was_opened_is_not_taken_for_the_slot(tmp_path, monkeypatch):
    """Who opened the file just before its owner removed it locks a file that has no name: two would hold one slot."""
    files = SlotFiles(tmp_path, TARGET, 1)
    first = SlotFiles(tmp_path, TARGET, 1).take()
    lock = fcntl.flock

    def release_first(descriptor, operation):
        monkeypatch.setattr(fcntl, "flock", lock)
        first.release()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", release_first)
    assert files.take() is None
    files.take().release()


# The order in which a dying process lets go.


def died(path: Path, holder: str) -> Path:
    """The file of a slot whose owner did not give it back."""
    path.write_text(holder)
    return path


@pytest.mark.parametrize("order", ["unordered", "ordered", "threaded", "unread"])
def test_killed_process_its_connection_has_ended_before_its_slot_is_taken(order):
    assert early_takes(order, "gmux", 100) == 0


@pytest.mark.parametrize("order", ["ordered", "unread"])
def test_killed_process_its_lock_outlives_its_connection(order):
    assert early_takes(order, "bare", 200) == 0


def test_killed_process_with_a_connection_below_its_slot_its_lock_is_free_first():
    """Or the two tests above could not fail."""
    assert early_takes("unordered", "bare", 400) > 0


def early_takes(order: str, how: str, rounds: int) -> int:
    words = [sys.executable, "-m", "tests.support.dying", order, how, str(rounds)]
    return int(subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=True, timeout=60).stdout)


def test_connection_below_its_slot_is_put_above_it_and_stays_the_same(tmp_path):
    left, right = socket.socketpair()
    left.setblocking(False)
    slot = SlotFiles(tmp_path, TARGET, 1).take()
    below = left.fileno()
    assert below < slot.descriptor
    above = slot.above(left)
    assert above.fileno() > slot.descriptor
    assert left.fileno() < 0
    assert not above.get_inheritable()
    assert above.gettimeout() == 0
    above.send(b"x")
    assert right.recv(1) == b"x"
    assert slot.above(above) is above
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(below)
    above.close()
    right.close()
    slot.release()


def test_slot_of_a_process_that_lives_on_is_taken_after_a_second(tmp_path, holder):
    """Its number may be one of another container; what is known is that nobody has the lock."""
    holder.send_signal(signal.SIGSTOP)
    path = path_of(SlotFiles(tmp_path, "other", 1))
    died(path, f"{holder.pid} {started(holder.pid)}\n")
    files = SlotFiles(tmp_path, "other", 1)
    begin = monotonic()
    while (slot := files.take()) is None:
        assert files.is_one_ending
        assert monotonic() - begin < DEATH_TIMEOUT + 10
    assert monotonic() - begin >= DEATH_TIMEOUT
    assert not files.is_one_ending
    slot.release()


def test_slot_of_a_process_that_dies_twice_is_waited_for_twice(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(slot_files, "DEATH_TIMEOUT", 0.05)
    files = SlotFiles(tmp_path, "other", 1)
    path = died(path_of(files), str(holder.pid))
    assert files.take() is None
    sleep(0.12)  # nobody looked
    assert files.take() is None
    sleep(0.06)
    files.take().release()
    died(path, str(holder.pid))
    assert files.take() is None


def started(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]


@pytest.mark.parametrize("who", ["nobody", "garbage", "binary", "self", "reused", "zombie", "ended"])
def test_slot_file_of_nobody_who_lives_is_taken_at_once(tmp_path, who):
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    if who == "ended":
        child.wait()
    texts = {
        "nobody": b"",
        "garbage": b"nobody's\n",
        "binary": b"\xff\xfe\xc2\xb2",
        "self": b"%d %b\n" % (os.getpid(), started(os.getpid()).encode()),
        "reused": b"%d 1\n" % os.getppid(),
    }
    files = SlotFiles(tmp_path, TARGET, 1)
    path_of(files).write_bytes(texts.get(who, b"%d\n" % child.pid))
    slot = files.take()
    child.wait()
    assert slot is not None
    assert slot.path.read_text() == f"{os.getpid()} {started(os.getpid())}\n"
    slot.release()


def test_slot_of_a_larger_pool_whose_owner_is_dying_counts(tmp_path, holder):
    files = SlotFiles(tmp_path, "other", 1)
    path = died(tmp_path / f"{files.name}.1", str(holder.pid))
    held = SlotFiles(tmp_path, "other", 1)
    assert held.take() is None
    holder.kill()
    holder.wait()
    held.take().release()
    assert not path.exists()


def test_holders_of_an_older_gmux_are_named_too(tmp_path):
    files = SlotFiles(tmp_path, TARGET, 2)
    for path, text in zip([path_of(files, n) for n in range(2)], ["123\n", "45 678\n"], strict=True):
        path.write_text(text)
    assert files.holders() == "another gmux, process 45, process 123"


#: Larger than any the kernel gives.
NUMBERS = st.integers(0, (1 << 64) - 1)


@given(st.one_of(st.builds(Process, NUMBERS, st.just("") | NUMBERS.map(str)), st.text()))
def test_process_is_read_as_it_was_written(thing):
    if isinstance(thing, Process):
        assert Process.parse(str(thing)) == thing
    else:
        Process.parse(thing)


# Files that are removed by others.


def look(files: SlotFiles) -> tuple[list[str], list[FileSlot]]:
    """What a look warns of, and the slots that are lost."""
    said: list[str] = []
    lost: list[FileSlot] = []
    files.look(said.append, lost.append)
    return said, lost


def test_file_that_was_removed_is_there_again_and_locked(tmp_path):
    files = SlotFiles(tmp_path, TARGET, 1)
    slot = files.take()
    number = slot.descriptor
    assert look(files) == ([], [])
    slot.path.unlink()
    assert look(files) == ([f"the slot file {slot.path} was removed, and is there again"], [])
    assert look(files) == ([], [])
    assert slot.descriptor == number
    assert not os.get_inheritable(number)
    others = SlotFiles(tmp_path, TARGET, 1)
    assert others.take() is None
    assert others.holders() == f"another gmux, process {os.getpid()}"
    slot.release()
    others.take().release()
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_anothers_by_now_is_lost_and_stays_when_it_is_released(tmp_path):
    files, others = SlotFiles(tmp_path, TARGET, 1), SlotFiles(tmp_path, TARGET, 1)
    slot = files.take()
    slot.path.unlink()
    taken = others.take()
    said, lost = look(files)
    assert lost == [slot]
    assert "another gmux has the slot" in said[0]
    slot.release()
    assert len(files) == 0
    assert taken.is_in_place()
    assert files.take() is None
    taken.release()


def test_file_that_cannot_be_made_again_is_told_and_tried_again(tmp_path):
    (tmp_path / "slots").mkdir()
    files = SlotFiles(tmp_path / "slots", TARGET, 1)
    slot = files.take()
    shutil.rmtree(tmp_path / "slots")
    said, lost = look(files)
    assert (len(said), lost) == (1, [])
    assert "cannot be made again (No such file or directory)" in said[0]
    (tmp_path / "slots").mkdir()
    look(files)
    assert slot.is_in_place()
    slot.release()


def test_file_that_is_held_does_not_age(tmp_path, monkeypatch):
    files = SlotFiles(tmp_path, TARGET, 1)
    slot = files.take()
    os.utime(slot.path, (0, 0))
    look(files)
    assert slot.path.stat().st_mtime == 0  # not each time
    monkeypatch.setattr(slot_files, "TOUCH_INTERVAL", 0)
    look(files)
    assert slot.path.stat().st_mtime > 0
    slot.release()


# The runtime folder.


def usual_dir() -> Path:
    return runtime_dir("", os.geteuid(), os.getegid())


@pytest.fixture
def base(monkeypatch, tmp_path):
    """The folder in which the runtime folder `gmux` is made, also where the tests run as root."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(folder, "Path", lambda *p: tmp_path / "gmux" if p == ("/run/gmux",) else Path(*p))
    return tmp_path


def test_runtime_folder_is_made_for_its_user_alone(base):
    path = usual_dir()
    assert path == base / "gmux"
    assert path.stat().st_mode & 0o777 == (0o700 if os.geteuid() else 0o711)
    assert usual_dir() == path


def test_runtime_folder_under_a_lax_umask_is_for_its_user_alone(base):
    before = os.umask(0)
    try:
        path = usual_dir()
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == (0o700 if os.geteuid() else 0o711)


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777, 0o1777])
def test_runtime_folder_that_others_may_write_to_is_refused(base, mode):
    (base / "gmux").mkdir()
    (base / "gmux").chmod(mode)
    with pytest.raises(StartError, match="others may write to it"):
        usual_dir()


def test_runtime_folder_of_another_user_is_refused(base, monkeypatch):
    (base / "gmux").mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    with pytest.raises(StartError, match="cannot use the runtime folder"):
        usual_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder for another user")
def test_runtime_folder_for_workers_of_another_user_is_theirs(tmp_path):
    path = runtime_dir(str(tmp_path / "run"), 4321, 4322)
    assert (path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777) == (4321, 4322, 0o700)
    assert runtime_dir(str(path), 4321, 4322) == path
    with pytest.raises(StartError, match="it belongs to user 4321, not 0"):
        runtime_dir(str(path), 0, 0)


def test_runtime_folder_that_was_named_is_used_and_made(base, tmp_path):
    assert runtime_dir(str(tmp_path / "named" / "run"), os.geteuid(), os.getegid()) == tmp_path / "named" / "run"


def test_runtime_folder_that_is_a_link_is_refused(base):
    (base / "elsewhere").mkdir(mode=0o700)
    (base / "gmux").symlink_to(base / "elsewhere")
    with pytest.raises(StartError, match="cannot use the runtime folder"):
        usual_dir()


def test_runtime_folder_that_is_a_file_is_refused(base):
    (base / "gmux").write_text("")
    with pytest.raises(StartError, match=r"cannot use the runtime folder .*File exists"):
        usual_dir()


def test_runtime_folder_without_a_session_is_named_after_its_user(base, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setattr(os, "geteuid", lambda: 4321)
    assert runtime_dir("", os.getuid(), os.getgid()) == base / "gmux-4321"


def test_runtime_folder_of_root_is_in_run(monkeypatch):
    made = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: made.append(path))
    monkeypatch.setattr(os, "chown", lambda *_: None)
    monkeypatch.setattr(Path, "lstat", lambda _: os.stat_result((0o40700, 0, 0, 0, 0, 0, 0, 0, 0, 0)))
    assert usual_dir() == Path("/run/gmux")
    assert made == [Path("/run/gmux")]
