"""gmux under test: a route in this process, or the real `gmux server`."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any, NamedTuple

import gevent
from gevent import socket, subprocess
from gevent.lock import BoundedSemaphore

from gmux import net
from gmux.access import AccessLog
from gmux.client import Client
from gmux.descriptors import Descriptors
from gmux.disk import Disk
from gmux.ends import Ends
from gmux.folder import Folder
from gmux.memory import Memory
from gmux.pool import Pool
from gmux.route import Common, Route
from gmux.scheduler import Scheduler
from gmux.slots import Grant, Slots
from gmux.spinner import Spinner
from gmux.succession import Succession
from tests.support.settings import read
from tests.support.target import Target
from tests.support.wait import PATIENCE, wait_until

LOG = logging.getLogger("gmux")
ROOT = Path(__file__).parents[2]

#: Settings of every test that says nothing else: a target that failed is tried again at once.
QUICK = {"retry_delay": "10ms"}

#: Clients that even a machine with few descriptors (`ulimit -n` of 1024) takes without a word about them in the log.
FEW_CLIENTS = {"max_clients": "500"}


class MemorySlots(Slots):
    """The slots of one process; it is its own slot, because one is like the other."""

    def __init__(self, size: int) -> None:
        self.free = BoundedSemaphore(size)
        self._size = size

    def acquire(self) -> Grant | None:
        self.free.acquire()
        return Grant(self)

    def release(self) -> None:
        self.free.release()

    def join(self) -> None:
        wait_until(lambda: self.free.counter == self._size)

    def above(self, sock: Any) -> Any:
        return sock


class Shared(NamedTuple):
    """What the processes of one service have in common."""

    listening: Any
    folder: Folder


class Service:
    """A route that serves. Its insides are read, never written, to see that they are whole."""

    def __init__(
        self, target: net.Address, slots: Slots | None, settings: dict[str, str], shared: Shared | None = None
    ) -> None:
        service = read(QUICK | settings)
        (self.config,) = service.routes
        where = self.config.listen
        if shared is None:
            listening = net.listen(where if isinstance(where, str) else ("127.0.0.1", 0))
        else:
            listening = shared.listening.dup()
        listening.setblocking(False)
        self.address = listening.getsockname()
        succession = None if shared is None else Succession(shared.folder, listening, (-1, -1))
        self.slots = slots or MemorySlots(self.config.pool_size)
        self.access = AccessLog(service) if service.access_log else None
        self.scheduler, self.ends = Scheduler(), Ends()
        self.memory = Memory(service.memory_limit, self.config.max_clients)
        common = Common(
            self.scheduler, Spinner(service.spin), self.memory, Disk(service.disk_limit), self.ends, Descriptors()
        )
        self.route = Route(
            self.config,
            service,
            listening,
            target,
            self.slots,
            common,
            LOG,
            succession,
            access=self.access,
        )

    @property
    def pool(self) -> Pool:
        return self.route._pool

    @property
    def clients(self) -> set[Client]:
        return self.route._clients.members

    @property
    def held(self) -> int:
        """Bytes in memory that are counted, beside the allowances."""
        return self.memory.used

    @property
    def waiting(self) -> int:
        return len(self.pool._waiting)

    @property
    def connected(self) -> int:
        return len(self.pool._upstreams)

    @property
    def is_ready(self) -> bool:
        """Whether all permits are back and all connections that shall be kept are there."""
        return self.is_whole and self.connected >= self.config.pool_min

    @property
    def is_whole(self) -> bool:
        """Whether nothing is under way and no permit is missing; a pool that has stopped has nothing at all."""
        if self.pool._is_stopping:
            return not self.connected
        return self.pool._permits.counter == self.config.pool_size and len(self.pool._idle) == self.connected

    def wait_ready(self) -> None:
        wait_until(lambda: self.is_ready, what=f"a pool that is ready: {self!r}")

    def wait_clients(self, number: int) -> None:
        wait_until(lambda: len(self.clients) == number, what=f"{number} clients: {self!r}")

    def __repr__(self) -> str:
        pool = self.pool
        return (
            f"permits {pool._permits.counter}/{self.config.pool_size}, connections {self.connected},"
            f" idle {len(pool._idle)}, waiting {self.waiting}, clients {len(self.clients)}, held {self.held}"
        )


@contextmanager
def failing_on_errors() -> Iterator[None]:
    """Fail when a callback of the loop or a greenlet raises: gevent only prints that."""
    hub = gevent.get_hub()
    errors: list[Any] = []
    usual = hub.handle_error

    def handle_error(context: Any, kind: Any, value: Any, trace: Any) -> None:
        if not issubclass(kind, hub.NOT_ERROR):
            errors.append(value)
        usual(context, kind, value, trace)

    hub.handle_error = handle_error
    try:
        yield
    finally:
        hub.handle_error = usual
    assert not errors, f"raised in the loop: {errors!r}"


@contextmanager
def serving(
    target: Target | net.Address, slots: Slots | None = None, shared: Shared | None = None, **settings: str
) -> Iterator[Service]:
    """A route to `target`; the protocol is the target's. At the end nothing of it may be left, nor missing."""
    if isinstance(target, Target):
        settings = {"protocol": target.framing.protocol} | settings
        address = target.where
    else:
        address = target
    service = Service(address, slots, settings, shared)
    service.route.start()
    is_good = False
    try:
        yield service
        wait_until(lambda: service.is_whole, what=f"a whole pool: {service!r}")
        is_good = True
    finally:
        service.route.drain(0.05)
        is_watching = bool(service.ends._ended)
        service.ends.close()
        service.scheduler.close()
        if service.access is not None:
            service.access.close()
        if is_good:
            assert not is_watching, "the end of a client that is gone is watched"
            _assert_nothing_left(service)


def _assert_nothing_left(service: Service) -> None:
    pool = service.pool
    wait_until(lambda: not service.clients, what=f"no client left: {service!r}")
    assert service.connected == 0, f"upstream connections are left: {service!r}"
    assert service.waiting == 0, f"requests are left: {service!r}"
    assert service.held == 0, f"memory is still counted: {service!r}"
    assert not pool._connecting
    if isinstance(service.slots, MemorySlots):
        assert service.slots.free.counter == service.config.pool_size


class Server:
    """The real `gmux server`, on a port of its own or where `listen` says. Use it in a `with`; its pid stops it.

    `words` go to its command line as they are; a setting that is named there gets the value "" here. `process` is for
    subprocess.Popen, and `module` is what runs in the place of gmux. The master of an upgrade belongs to it, and is
    stopped with it.
    """

    def __init__(
        self,
        target: Target | net.Address,
        /,
        *words: str,
        process: Mapping[str, Any] = MappingProxyType({}),
        module: str = "gmux",
        **settings: str,
    ) -> None:
        usual = {"listen": "127.0.0.1:0"} | QUICK | FEW_CLIENTS
        if isinstance(target, Target):
            usual["protocol"] = target.framing.protocol
            target = target.where
        usual["target"] = net.format_address(target)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in (usual | settings).items() if value]
        self._is_quiet = "-q" in words or bool(settings.keys() & {"log_file", "log_level"})
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, "server", *flags, *words],
            **{"cwd": ROOT, "stderr": subprocess.PIPE} | dict(process),
        )
        self.pid = self._process.pid
        self._reading = gevent.spawn(self._read)

    def __enter__(self) -> Server:
        try:
            self.address = wait_until(self.find_address, what="the line that tells the address")
        except BaseException:
            self.stop()
            raise
        return self

    def find_address(self) -> net.Address | None:
        """What the last line of the log says of it."""
        told = re.search(r"listening on unix:(\S+)", self.said("listening on"))
        if told:
            return told[1]
        told = re.search(r"listening on (\S+):(\d+)", self.said("listening on"))
        if told:
            return told[1].strip("[]"), int(told[2])
        # A quiet one does not tell; it is known by its socket.
        port = self._is_quiet and listening_port(self.pid)
        return ("127.0.0.1", port) if port else None

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def said(self, text: str) -> str:
        """The last line of the log with `text`, or nothing."""
        return next((line for line in reversed(self.log) if text in line), "")

    def workers(self, master: int = 0) -> list[int]:
        """The children of the master, or of another one; that of an upgrade is not one of them."""
        master = master or self.pid
        try:
            pids = [int(pid) for pid in Path(f"/proc/{master}/task/{master}/children").read_text().split()]
        except OSError:
            return []
        return [pid for pid in pids if pid not in self.upgrades()]

    def upgrades(self) -> list[int]:
        """The masters of upgrades that are alive, oldest first."""
        pids = [int(pid) for line in self.log for pid in re.findall(r"the new master is process (\d+)", line)]
        return [pid for pid in pids if "gmux" in title(pid)]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_master(self) -> int:
        """The exit code of the process that was started, when it ends by itself."""
        code: int = self._process.wait(PATIENCE)
        return code

    def wait(self) -> int:
        """The same, when all processes have ended."""
        code = self.wait_master()
        self._reading.join(PATIENCE)
        return code

    def stop(self) -> int:
        """TERM, and KILL when that does not help; the exit code."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                for worker in self.workers():
                    os.kill(worker, signal.SIGKILL)
                self._process.kill()
                self._process.wait()
        # Until the last process of it has closed its log; an orphan does so a moment after its master. The master of an
        # upgrade may be known only now.
        ended: set[int] = set()
        end = monotonic() + PATIENCE
        while not self._reading.ready() and monotonic() < end:
            for master in {*self.upgrades(), *self._masters()} - ended:
                ended.add(master)
                with suppress(ProcessLookupError):
                    os.kill(master, signal.SIGTERM)
            self._reading.join(0.05)
        return self._process.returncode

    def _masters(self) -> list[int]:
        """Those that have the standard error of this one: a quiet one says nothing of its upgrade."""
        pipe = os.readlink(f"/proc/self/fd/{self._process.stderr.fileno()}")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # of another user, or gone
                if os.readlink(process / "fd/2") == pipe and title(int(process.name)).startswith("gmux: master"):
                    found.append(int(process.name))
        return found

    def _read(self) -> None:
        for line in self._process.stderr:
            self.log.append(line.decode(errors="replace").rstrip())


def title(pid: int) -> str:
    """What `ps` shows; nothing for a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def listening_port(pid: int) -> int:
    """The IPv4 port on which the process listens, or 0."""
    try:
        links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return 0  # it has ended, or closed a descriptor while we looked
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = [int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in links]
    return next(iter(ports), 0)


def spool_bytes(pid: int) -> int:
    """The bytes in temporary files that the process holds open; they have no name any more."""
    total = 0
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if "deleted" in os.readlink(link):
                total += link.stat().st_size
        except OSError:
            continue
    return total


def resident_bytes(pid: int) -> int:
    """The memory of the process that is in RAM."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def connecting_sockets(port: int) -> int:
    """Sockets of this machine that are connecting to `port`: a SYN is out and may still be answered."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[3] == "02" and row[2].endswith(f":{port:04X}") for row in rows)


def deaf_listener() -> Any:
    """A socket that listens and takes no connection any more: its queue is full. The second of the pair fills it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    filler = socket.create_connection(listening.getsockname())
    return listening, filler
