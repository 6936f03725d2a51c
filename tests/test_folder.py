"""The runtime folder and what is in it are kept: cleaners stay away, and what is removed all the same is put back."""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic

import gevent
import pytest
from gevent.lock import Semaphore

from gmux import folder as folder_module
from gmux import mailbox
from gmux.errors import StartError
from gmux.folder import LOOK_INTERVAL, Folder
from gmux.mailbox import FORM, Mailbox, Sent
from gmux.sharing import SharedSlots
from gmux.slots import Ask
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client, tagged
from tests.support.framing import MPU
from tests.support.programs import program
from tests.support.service import LOG, Server, serving
from tests.support.stream import Closed
from tests.support.strict_target import StrictTarget
from tests.support.target import Target, answer, hold
from tests.support.wait import wait_until


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def folder(path):
    folder = Folder(path)
    yield folder
    folder.close()


def is_locked(path: Path) -> bool:
    """Whether a cleaner that wants the folder for itself passes it by."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


# The lock.


def test_folder_is_locked_as_long_as_a_process_uses_it(path):
    assert not is_locked(path)
    one, two = Folder(path), Folder(path)
    assert is_locked(path)
    one.close()
    assert is_locked(path)
    two.close()
    assert not is_locked(path)


def test_folder_that_a_cleaner_has_locked_is_used_and_locked_when_that_is_done(path):
    cleaner = os.open(path, os.O_RDONLY)
    fcntl.flock(cleaner, fcntl.LOCK_EX)
    folder = Folder(path)
    box = Mailbox(folder, "subject")
    box.open(lambda message, descriptors: None, LOG)
    os.close(cleaner)
    wait_until(lambda: is_locked(path))
    box.close()
    folder.close()


def test_lock_is_held_by_a_service_over_a_reload(tmp_path):
    with Target() as target, Server(target, runtime_dir=str(tmp_path / "run")) as server:
        assert is_locked(tmp_path / "run")
        server.signal(signal.SIGHUP)
        wait_until(lambda: server.said("reloaded"))
        assert is_locked(tmp_path / "run")
    assert not is_locked(tmp_path / "run")


def test_cleaner_of_systemd_passes_the_folder_by(tmp_path):
    cleaner = program("systemd-tmpfiles", "systemd-standalone-tmpfiles")
    base = tmp_path / "base"
    (base / "run").mkdir(parents=True, mode=0o700)
    (base / "stray").mkdir()
    (base / "stray" / "file").touch()
    rules = tmp_path / "clean.conf"
    rules.write_text(f"d {base} 0755 - - 1s\n")
    with Target() as target, Server(target, runtime_dir=str(base / "run")) as server, Client(server.address) as client:
        assert client.ask(b"one") == b"one"
        before = sorted((base / "run").iterdir())
        # By the change of a file's status, too, whose time nobody can set.
        gevent.sleep(1.1)
        subprocess.run([cleaner, "--clean", str(rules)], check=True, timeout=30)
        assert not (base / "stray" / "file").exists(), "the cleaner has done nothing"
        assert sorted((base / "run").iterdir()) == before
        assert client.ask(b"two") == b"two"
    assert not server.said("WARN")


# The folder itself.


def test_folder_that_was_removed_is_made_again_and_locked(path, folder, caplog):
    shutil.rmtree(path)
    folder.mend()
    assert path.stat().st_mode & 0o777 == 0o700
    assert is_locked(path)
    assert os.path.samestat(os.stat(folder.at), path.stat())
    assert [r.getMessage() for r in caplog.records] == [
        f"the runtime folder {path} was removed, and is there again; {folder_module.HINT}"
    ]
    folder.mend()
    assert len(caplog.records) == 1


def test_folder_that_another_has_made_again_is_the_one_that_is_used(path, folder):
    path.rename(path.parent / "old")
    path.mkdir(mode=0o700)
    folder.mend()
    assert os.path.samestat(os.stat(folder.at), path.stat())
    assert is_locked(path)


@pytest.mark.parametrize("what", ["others may write to it", "File exists"])
def test_folder_that_is_none_of_ours_is_not_used(path, folder, what):
    path.rename(path.parent / "old")
    if what == "File exists":
        path.symlink_to(path.parent / "old")
    else:
        path.mkdir()
        path.chmod(0o777)
    with pytest.raises(StartError, match=what):
        folder.mend()
    assert os.path.samestat(os.stat(folder.at), (path.parent / "old").stat())


def test_folder_that_cannot_be_made_again_is_told_once_and_tried_again(path, folder, caplog):
    looks: list[float] = []
    folder.watch(lambda: looks.append(monotonic()))
    path.rename(path.parent / "old")
    path.write_text("in its way")
    wait_until(lambda: caplog.records)
    gevent.sleep(LOOK_INTERVAL * 1.5)
    assert len(caplog.records) == 1
    assert not looks
    path.unlink()
    wait_until(lambda: looks)
    assert path.is_dir()
    folder._looks.clear()
    folder.unwatch(folder.mend)


def test_same_warning_is_said_again_after_a_while(folder, caplog, monkeypatch):
    monkeypatch.setattr(folder_module, "WARN_INTERVAL", 0.05)
    for _ in range(3):
        folder.warn("one")
        folder.warn("two")
    assert len(caplog.records) == 2
    gevent.sleep(0.06)
    folder.warn("one")
    assert len(caplog.records) == 3


def test_nothing_is_looked_at_when_nobody_asks_for_it(folder):
    box = Mailbox(folder, "subject")
    assert folder._timer is None
    box.open(lambda message, descriptors: None, LOG)
    assert folder._timer is not None
    box.close()
    assert folder._timer is None


# Mailboxes.


def test_mailbox_that_was_removed_is_there_again_and_nothing_sent_is_lost(path, folder, caplog):
    got: list[dict] = []
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    two.open(lambda message, descriptors: got.append(message), LOG)
    assert one.send(two.name, {"n": 1}) is Sent.DONE
    (path / two.name).unlink()
    two._look()
    assert got == [{"n": 1}]
    assert one.peers() == [two.name]
    assert (path / two.name).stat().st_mode & 0o777 == 0o600
    assert one.send(two.name, {"n": 2}) is Sent.DONE
    wait_until(lambda: len(got) == 2)
    assert f"the mailbox {two.name} was removed, and is there again" in caplog.text
    one.close()
    two.close()
    assert list(path.iterdir()) == []


def test_mailbox_is_looked_at_each_second(path, folder):
    box = Mailbox(folder, "subject")
    box.open(lambda message, descriptors: None, LOG)
    (path / box.name).unlink()
    wait_until(lambda: (path / box.name).exists())
    box.close()


@pytest.mark.parametrize("end", ["hide", "leave", "close"])
def test_mailbox_that_is_left_is_not_made_again(path, folder, end, caplog):
    box, other = Mailbox(folder, "subject"), Mailbox(folder, "other")
    looks: list[float] = []
    other.open(lambda message, descriptors: None, LOG)
    box.open(lambda message, descriptors: None, LOG)
    getattr(box, end)()
    folder.watch(lambda: looks.append(monotonic()))
    wait_until(lambda: looks)
    assert [p.name for p in path.iterdir()] == [other.name]
    assert not caplog.records
    box.close()
    other.close()
    folder._looks.clear()
    folder.unwatch(folder.mend)


def test_mailbox_that_cannot_be_made_again_goes_on_with_what_it_has(path, folder, caplog):
    got: list[dict] = []
    one, two = Mailbox(folder, "subject"), Mailbox(folder, "subject")
    two.open(lambda message, descriptors: got.append(message), LOG)
    (path / two.name).unlink()
    (path / two.name).mkdir()  # in its way
    two._look()
    two._look()
    assert len(caplog.records) == 1
    assert "cannot be made again" in caplog.text
    (path / two.name).rmdir()
    two._look()
    assert one.send(two.name, {"n": 1}) is Sent.DONE
    wait_until(lambda: got)
    one.close()
    two.close()


def test_mailbox_does_not_age(path, folder, monkeypatch):
    box = Mailbox(folder, "subject")
    box.open(lambda message, descriptors: None, LOG)
    os.utime(path / box.name, (0, 0))
    box._look()
    assert (path / box.name).stat().st_mtime == 0  # not each time
    monkeypatch.setattr(mailbox, "TOUCH_INTERVAL", 0)
    box._look()
    assert (path / box.name).stat().st_mtime > 0
    box.close()


# A pool whose slot is another's.


def slot_of(path: Path) -> Path:
    (slot,) = (p for p in path.iterdir() if f".{FORM}." not in p.name)
    return slot


def keeper(folder: Folder, size: int = 1) -> SharedSlots:
    return SharedSlots(folder, "target", size, "", LOG)


def steal(path: Path) -> int:
    """What a process does that finds no file of the slot."""
    slot_of(path).unlink()
    slots = keeper(Folder(path))
    slot = slots._files.take()
    slots._mailbox.close()
    return slot


@pytest.mark.parametrize("protocol", [{}, {"pipeline": "4"}, {"framing": MPU}])
def test_idle_connection_that_is_one_too_many_ends_at_once_and_comes_again_later(path, folder, protocol):
    settings = dict(protocol)
    framing = {"framing": settings.pop("framing")} if "framing" in settings else {}
    with Target(**framing) as target, serving(target, keeper(folder), retry_delay="1h", **settings) as service:
        service.wait_ready()
        stolen = steal(path)
        wait_until(lambda: target.open == 0)
        gevent.sleep(0.1)
        wait_until(lambda: service.connected == 0)
        stolen.release()
        service.wait_ready()  # not after --retry-delay: the target has done nothing wrong
        assert target.open == target.peak == 1


@pytest.mark.parametrize("pipeline", ["1", "4"])
def test_busy_connection_that_is_one_too_many_fails_its_requests_at_once(path, folder, pipeline):
    gate = Semaphore(0)
    settings = {"pipeline": pipeline, "retry_delay": "1h"}
    with Target((hold(gate), answer)) as target, serving(target, keeper(folder), **settings) as service:
        with ExitStack() as stack:
            clients = [stack.enter_context(Client(service.address)) for _ in range(int(pipeline))]
            for client in clients:
                client.send(b"request")
            wait_until(lambda: target.requests)
            stolen = steal(path)
            for client in clients:
                client.receive_end()
            gate.release()
            wait_until(lambda: target.open == 0)
        stolen.release()
        for _ in range(9):
            gate.release()
        with Client(service.address) as client:
            assert client.ask(b"again") == b"again"


def test_closing_connection_that_is_one_too_many_is_reset(path, folder, monkeypatch):
    monkeypatch.setattr("gmux.pool.CLOSE_TIMEOUT", 3600)
    with Target(fin_delay=3600) as target, serving(target, keeper(folder)) as service:
        service.wait_ready()
        (upstream,) = service.pool._upstreams
        upstream.retire("of the test")
        stolen = steal(path)
        wait_until(lambda: not service.connected)
        assert target.open == 1  # as it does not look
        stolen.release()
        target.fin_delay = 0
        service.wait_ready()


def test_connection_that_is_being_made_for_a_slot_that_is_anothers_ends_when_it_is_there(path, folder):
    gate = Semaphore(0)
    with Target() as target:
        slots = keeper(folder)
        acquire = slots.acquire

        def acquire_later():
            grant = acquire()
            gate.acquire()
            return grant

        slots.acquire = acquire_later
        with serving(target, slots) as service:
            wait_until(lambda: len(slots._files))
            stolen = steal(path)
            gevent.sleep(LOOK_INTERVAL * 1.2)
            gate.release()
            wait_until(lambda: target.accepted and not target.open)
            stolen.release()
            gate.release()
            service.wait_ready()


def test_slot_whose_file_is_gone_is_not_given_away_until_it_is_there_again(path, folder):
    """Who gets it would not know it for a slot, and end the connection."""
    others = Folder(path)
    with Target() as target, serving(target, keeper(folder)) as service:
        service.wait_ready()
        slot_of(path).unlink()
        (slot,) = service.slots._files._held
        (upstream,) = service.pool._upstreams
        box = Mailbox(others, service.slots._files.name)
        assert not service.slots.give(Ask(box.name, 0, 1, ""), slot, upstream.sock)
        wait_until(slot.is_in_place)
        assert target.accepted == target.open == 1
        box.close()
    others.close()


# Real services, with all that is in the folder removed at random.


class Removals:
    """Two services with one connection between them, and what is removed under them."""

    def __init__(self, path: Path, target: StrictTarget, stack: ExitStack, dice: random.Random) -> None:
        self.path = path
        self.dice = dice
        settings = {"protocol": "echo", "runtime_dir": str(path), "queue_timeout": "5s"}
        self.servers = [stack.enter_context(Server(target.address, **settings)) for _ in range(2)]
        self.answered = self.cut = 0
        self.is_over = False

    def client(self, number: int) -> None:
        n = 0
        while not self.is_over:
            with suppress(OSError, Closed), Client(self.servers[number % 2].address) as client:
                while not self.is_over:
                    n += 1
                    asked = tagged(number, n)
                    assert client.ask(asked) == asked
                    self.answered += 1
                    gevent.sleep(0.001)
                return
            self.cut += 1
            gevent.sleep(0.01)

    def remove(self) -> None:
        deed = self.dice.randrange(4)
        with suppress(FileNotFoundError):
            if deed == 0:
                shutil.rmtree(self.path)
            elif deed == 1:
                slot_of(self.path).unlink()
            else:
                # None is there where all were removed in the last moment.
                files = sorted(self.path.iterdir())
                for file in self.dice.sample(files, min(1, len(files))):
                    file.unlink()

    def connections(self, port: int) -> int:
        """Connections of the two services that the target has not seen the end of."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[3] == "01" and row[2].endswith(f":{port:04X}") for row in rows)


@pytest.mark.timeout(120)
def test_files_removed_under_load_there_is_one_connection_again_and_no_answer_is_wrong(tmp_path):
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    dice = random.Random(seed)
    path = tmp_path / "run"
    with StrictTarget(9) as target, ExitStack() as stack:
        removals = Removals(path, target, stack, dice)
        clients = [gevent.spawn(removals.client, number) for number in range(8)]
        wait_until(lambda: removals.answered > 100)
        for _ in range(5):
            removals.remove()
            gevent.sleep(dice.uniform(0, 1.5))
        removals.remove()
        # A look, and one more for a connection that was being made.
        gevent.sleep(2 * LOOK_INTERVAL + 0.2)
        for _ in range(50):
            assert removals.connections(target.address[1]) <= 1
            gevent.sleep(0.005)
        assert any(server.said("something removes files in the runtime folder") for server in removals.servers)
        before = removals.cut
        # What was put back is as good as it was: a reload hands everything over.
        for server in removals.servers:
            server.signal(signal.SIGHUP)
            wait_until(lambda server=server: server.said("reloaded"))
        gevent.sleep(0.1)
        assert removals.cut == before
        removals.is_over = True
        gevent.joinall(clients, raise_error=True)
    print(f"{removals.answered} answered, {removals.cut} cut, target {target.told}")


def test_folder_that_is_gone_is_made_again_by_the_service_and_serves_new_ones(tmp_path):
    path = tmp_path / "run"
    with Target(limit=1) as target, Server(target, runtime_dir=str(path)) as server, Client(server.address) as client:
        assert client.ask(b"one") == b"one"
        shutil.rmtree(path)
        wait_until(lambda: server.said(".0 was removed, and is there again"))
        assert len(list(path.iterdir())) == 3
        with Server(target, runtime_dir=str(path)) as other, Client(other.address) as second:
            assert second.ask(b"two") == b"two"
            assert client.ask(b"three") == b"three"
        assert target.refused == 0
        assert server.said("the runtime folder")


def test_request_that_needs_a_slot_while_the_folder_is_gone_is_served(tmp_path):
    path = tmp_path / "run"
    settings = {"runtime_dir": str(path), "pool_min": "0", "retry_delay": "1h", "upstream_idle_timeout": "20ms"}
    with Target() as target, Server(target, **settings) as server, Client(server.address) as client:
        assert client.ask(b"one") == b"one"
        wait_until(lambda: server.said("closed target connection"))
        shutil.rmtree(path)
        assert client.ask(b"two") == b"two"
        assert target.accepted == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start workers as another user")
def test_folder_that_the_workers_may_not_make_is_made_by_the_master():
    with ExitStack() as stack:
        # Those of pytest are for the user that runs it.
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base.chmod(0o755)
        path = base / "run"
        target = stack.enter_context(Target())
        server = stack.enter_context(Server(target, runtime_dir=str(path), user="nobody"))
        client = stack.enter_context(Client(server.address))
        assert client.ask(b"one") == b"one"
        owner = path.stat().st_uid
        shutil.rmtree(path)
        wait_until(lambda: server.said(".0 was removed, and is there again"))
        assert path.stat().st_uid == owner
        assert client.ask(b"two") == b"two"
