"""What comes over a mailbox is checked before it is believed: any program of the same user may send anything."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import select
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import gevent
import pytest
from gevent import socket
from hypothesis import given, settings
from hypothesis import strategies as st

from gmux import net, sharing
from gmux.folder import Folder
from gmux.mailbox import FORM, MAX_MESSAGE
from gmux.sharing import SharedSlots
from gmux.slot_files import Process, SlotFiles
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.service import Service, Shared, serving
from tests.support.target import Target
from tests.support.wait import wait_until

LOG = logging.getLogger("gmux")
BUDGET = "target"
DROPPED = "is dropped: "


def open_files() -> list[str]:
    files = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # that with which the folder is listed
            files.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return files


class Stranger:
    """Another program of the user: it sends what it likes to both mailboxes of a service."""

    def __init__(self, folder: Path, service: Service, target: Target) -> None:
        self.folder = folder
        self.service = service
        self.target = target
        self.files = SlotFiles(folder, BUDGET, 1)
        self.slots_mailbox = service.slots._mailbox.name
        self.clients_mailbox = service.route._succession._mailbox.name
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def close(self) -> None:
        self._sock.close()

    def send(self, mailbox: str, data: bytes, descriptors: list[int]) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))] if descriptors else []
        # By the folder's descriptor, as the path of a test is too long for the name of a socket.
        at = str(self.service.route._succession._mailbox._folder.at / mailbox)
        while True:
            try:
                self._sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT, at)
            except BlockingIOError:
                gevent.sleep(0.001)
            else:
                return

    def say(self, mailbox: str, message: object, *descriptors: int) -> None:
        self.send(mailbox, json.dumps(message).encode(), list(descriptors))

    @contextmanager
    def lock(self, number: int) -> Iterator[int]:
        """A slot of a larger pool, which nobody else has."""
        descriptor = os.open(self.folder / f"{self.files.name}.{number}", os.O_RDWR | os.O_CREAT)
        # One that was made before may still be on its way.
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@pytest.fixture
def stranger(tmp_path) -> Iterator[Stranger]:
    folder = Folder(tmp_path)
    with Target() as target, net.listen(("127.0.0.1", 0)) as listening:
        slots = SharedSlots(folder, BUDGET, 1, "kind", LOG)
        with serving(target, slots, Shared(listening, folder), pool_min="1") as service:
            service.wait_ready()
            stranger = Stranger(tmp_path, service, target)
            yield stranger
            stranger.close()
    folder.close()


@contextmanager
def all_closed() -> Iterator[None]:
    """Whatever was sent is closed soon, by the service and by the test."""
    before = open_files()
    yield
    wait_until(lambda: len(open_files()) == len(before), what=f"files as before: {before}")


# One by one.


def listening(stack: ExitStack) -> int:
    return stack.enter_context(socket.create_server(("127.0.0.1", 0))).fileno()


def unconnected(stack: ExitStack, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> int:
    return stack.enter_context(socket.socket(family, kind)).fileno()


def pair(stack: ExitStack, kind: int = socket.SOCK_STREAM) -> int:
    one, other = socket.socketpair(socket.AF_UNIX, kind)
    stack.enter_context(other)
    return stack.enter_context(one).fileno()


def connected(stack: ExitStack, host: str = "127.0.0.1") -> int:
    """A connection to somewhere else."""
    server = stack.enter_context(socket.create_server((host, 0)))
    sock = stack.enter_context(socket.create_connection(server.getsockname()))
    stack.enter_context(server.accept()[0])
    return sock.fileno()


def opened(stack: ExitStack, path: str, flags: int = os.O_RDONLY) -> int:
    descriptor = os.open(path, flags)
    stack.callback(os.close, descriptor)
    return descriptor


def pipe(stack: ExitStack) -> int:
    ends = os.pipe()
    for end in ends:
        stack.callback(os.close, end)
    return ends[1]


def eventfd(stack: ExitStack) -> int:
    descriptor = os.eventfd(0)
    stack.callback(os.close, descriptor)
    return descriptor


#: What is neither a client nor a connection to the target.
FOREIGN: dict[str, Callable[[ExitStack], int]] = {
    "pipe": pipe,
    "device": lambda stack: opened(stack, os.devnull),
    "file": lambda stack: opened(stack, __file__),
    "path": lambda stack: opened(stack, __file__, os.O_PATH),
    "folder": lambda stack: opened(stack, "/tmp"),
    "event": eventfd,
    "epoll": lambda stack: stack.enter_context(select.epoll()).fileno(),
    "datagrams": lambda stack: unconnected(stack, kind=socket.SOCK_DGRAM),
    "Unix datagrams": lambda stack: pair(stack, socket.SOCK_DGRAM),
    "Unix stream": pair,
    "Unix packets": lambda stack: pair(stack, socket.SOCK_SEQPACKET),
}

UNREADABLE = {
    "nothing": b"",
    "no JSON": b"\xff",
    "a list": b"[]",
    "a number": b"1" * 4000,
    "brackets in brackets": b"[" * 4000,
    "objects in objects": b'{"a":' * 800,
    "surrogate": b'"\xed\xa0\x80"',
    "too long": b'{"protocol": "echo", "a": "' + b"x" * MAX_MESSAGE + b'"}',
}


@pytest.mark.parametrize("data", UNREADABLE.values(), ids=UNREADABLE)
def test_message_that_cannot_be_read_is_dropped_and_its_descriptors_are_closed(data, stranger, caplog):
    with all_closed(), ExitStack() as stack:
        for mailbox in (stranger.slots_mailbox, stranger.clients_mailbox):
            stranger.send(mailbox, data, [pipe(stack)])
        wait_until(lambda: sum(DROPPED in line for line in caplog.messages) == 2)


def test_message_with_more_descriptors_than_one_has_is_dropped(stranger, caplog):
    with all_closed(), ExitStack() as stack:
        stranger.say(stranger.clients_mailbox, {"protocol": "echo"}, *(pipe(stack) for _ in range(20)))
        wait_until(lambda: any("more files came with it" in line for line in caplog.messages))


def test_warnings_of_messages_are_limited(stranger, caplog):
    for _ in range(100):
        stranger.say(stranger.slots_mailbox, {"ask": 1})
    wait_until(lambda: any("more like these" in line for line in caplog.messages))
    assert sum(DROPPED in line for line in caplog.messages) < 100


@pytest.mark.parametrize("make", [*FOREIGN.values(), connected], ids=[*FOREIGN, "elsewhere"])
def test_what_is_no_client_of_the_listener_is_not_served(make, stranger, caplog):
    with all_closed(), ExitStack() as stack:
        stranger.say(stranger.clients_mailbox, {"protocol": "echo"}, make(stack))
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))
        assert not stranger.service.clients


@pytest.mark.parametrize("make", [listening, unconnected])
def test_client_that_is_not_connected_is_closed(make, stranger):
    """Like one that left on its way."""
    with all_closed(), ExitStack() as stack:
        stranger.say(stranger.clients_mailbox, {"protocol": "echo"}, make(stack))
        with Client(stranger.service.address) as client:
            assert client.ask(b"request") == b"request"


@pytest.mark.parametrize("message", [{"protocol": 1}, {"protocol": ["echo"]}, {"protocol": "echo", "a": 1}, {}])
def test_message_with_two_clients_or_none_is_dropped(message, stranger, caplog):
    with all_closed(), ExitStack() as stack:
        stranger.say(stranger.clients_mailbox, message, connected(stack), connected(stack))
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))


def test_slot_is_believed_with_its_lock_and_a_connection_to_the_target(stranger):
    """What the other tests leave out one by one."""
    with all_closed(), stranger.lock(7) as slot, socket.create_connection(stranger.target.address) as sock:
        stranger.say(stranger.slots_mailbox, {"slot": f"{stranger.files.name}.7", "used": 1}, sock.fileno(), slot)
        # There is no place for it, so it is ended and given back.
        wait_until(lambda: sock.fileno() >= 0 and not stranger.folder.joinpath(f"{stranger.files.name}.7").exists())


@pytest.mark.parametrize("make", [*FOREIGN.values(), connected], ids=[*FOREIGN, "elsewhere"])
def test_what_is_no_connection_to_the_target_is_not_used(make, stranger, caplog):
    with all_closed(), ExitStack() as stack:
        slot = stack.enter_context(stranger.lock(7))
        message = {"slot": f"{stranger.files.name}.7", "used": 0}
        stranger.say(stranger.slots_mailbox, message, make(stack), slot)
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))
        assert len(stranger.service.slots._files) == 1


@pytest.mark.parametrize(
    "used", [True, -1, 1 << 60, 1.5, "1", None], ids=["bool", "negative", "huge", "float", "text", "null"]
)
def test_slot_with_odd_use_is_dropped(used, stranger, caplog):
    with all_closed(), stranger.lock(7) as slot:
        stranger.say(stranger.slots_mailbox, {"slot": f"{stranger.files.name}.7", "used": used}, slot)
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))


@pytest.mark.parametrize(
    "suffix",
    ["", ".", "/../x", ".1/../x", ".\0", ".\ud800", ".07", ".12345", ".-1", f".{FORM}.0", ".1.1", ".²"],
    ids=ascii,
)
def test_name_that_no_slot_has_is_dropped(suffix, stranger, caplog):
    with all_closed(), stranger.lock(7) as slot:
        stranger.say(stranger.slots_mailbox, {"slot": stranger.files.name + suffix, "used": 0}, slot)
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))


def test_slot_whose_lock_did_not_come_is_dropped(stranger):
    files, folder = stranger.service.slots._files, stranger.folder
    name = f"{files.name}.7"
    with stranger.lock(7) as locked:
        assert files.has(name, locked)
        another = os.open(folder / name, os.O_RDWR)
        assert not files.has(name, another)
        fcntl.flock(locked, fcntl.LOCK_UN)
        assert not files.has(name, another)
        fcntl.flock(locked, fcntl.LOCK_SH)
        assert not files.has(name, locked)
        os.close(another)
    (folder / name).unlink()
    for make in (os.mkdir, os.mkfifo, lambda path: path.symlink_to(__file__)):
        path = folder / f"{files.name}.8"
        make(path)
        assert not files.has(path.name, 0)
        (os.rmdir if path.is_dir() else os.unlink)(path)


def test_second_copy_of_a_slot_that_is_held_is_dropped(stranger, caplog):
    (held,) = stranger.service.slots._files._held
    with all_closed():
        stranger.say(stranger.slots_mailbox, {"slot": held.path.name, "used": 0}, held.descriptor)
        wait_until(lambda: any(DROPPED in line for line in caplog.messages))
        assert list(stranger.service.slots._files._held) == [held]


# A host that is a name may have moved, so its port alone tells.
@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("127.0.0.1", 0, True),
        ("127.0.0.1", 1, False),
        ("127.0.0.2", 0, False),
        ("localhost", 0, True),
        ("0.0.0.0", 0, True),
        ("::", 0, True),
        ("::ffff:127.0.0.1", 0, True),
        ("::ffff:127.0.0.2", 0, False),
        ("::1", 0, False),
        ("fe80::1%lo", 0, False),
    ],
)
def test_connection_leads_to_its_own_address_alone(host, port, expected):
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = server.getsockname()
        with socket.create_connection(where) as sock:
            assert net.leads_to(sock, (host, where[1] + port)) is expected
            assert not net.leads_to(sock, "/a/socket")


def test_unix_socket_of_any_name_has_no_port(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a test is too long for the name of a socket
    for name in ("path", b"\0", b"\0abstract"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(name)
            assert net.local_port(sock) == 0


def ask(stranger: Stranger, **changes: object) -> dict[str, object]:
    """One that is remembered, with something changed."""
    peer = f"{stranger.files.name}.{FORM}.01234567"
    usual = {"ask": peer, "held": 0, "need": 1, "kind": "kind", "process": str(Process.this()), "valid": 1.0}
    return usual | changes


@pytest.mark.parametrize(
    "changes",
    [
        *({"held": value} for value in (True, -1, 1 << 60, 1.5, "1", None)),
        *({"need": value} for value in (True, -1, 1 << 60, 1.5, "1", None)),
        *({"valid": value} for value in (True, -1.0, 0.0, 1, math.nan, math.inf, 1e300, "1", None)),
        *({"process": value} for value in ("", "x", "1 2 3", "9" * 3000, "\ud800", 1, None)),
        *({"ask": value} for value in ("", "x", "../x", "\0", "\ud800", 1, None)),
        {"kind": 1},
    ],
    ids=ascii,
)
def test_odd_ask_is_dropped(changes, stranger, caplog):
    stranger.say(stranger.slots_mailbox, ask(stranger, **changes))
    wait_until(lambda: any(DROPPED in line for line in caplog.messages))
    assert not stranger.service.slots.has_asks()


def test_ask_in_its_own_name_or_with_descriptors_is_dropped(stranger, caplog):
    with all_closed(), ExitStack() as stack:
        stranger.say(stranger.slots_mailbox, ask(stranger, ask=stranger.slots_mailbox))
        stranger.say(stranger.slots_mailbox, ask(stranger), pipe(stack))
        wait_until(lambda: sum(DROPPED in line for line in caplog.messages) == 2)
    assert not stranger.service.slots.has_asks()


def test_asks_that_are_remembered_have_a_limit(stranger):
    slots = stranger.service.slots
    with Client(stranger.service.address) as client:
        for number in range(2 * sharing.MAX_ASKS):
            peer = f"{stranger.files.name}.{FORM}.{number:08x}"
            stranger.say(stranger.slots_mailbox, ask(stranger, ask=peer, need=0, valid=10.0))
        wait_until(lambda: len(slots._asks) == sharing.MAX_ASKS)
        assert client.ask(b"request") == b"request"
        assert len(slots._asks) == sharing.MAX_ASKS


def test_ask_of_who_is_gone_costs_one_connection_at_most(stranger):
    stranger.say(stranger.slots_mailbox, ask(stranger, need=1000, kind="other", valid=10.0))
    wait_until(lambda: stranger.target.accepted == 2)
    stranger.service.wait_ready()
    assert not stranger.service.slots.has_asks()


# Anything at all.


def to_target(stack: ExitStack, stranger: Stranger) -> int:
    return stack.enter_context(socket.create_connection(stranger.target.address)).fileno()


def to_service(stack: ExitStack, stranger: Stranger) -> int:
    """The service's own end of a client's connection, as it were."""
    server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
    stack.enter_context(socket.create_connection(server.getsockname()))
    return stack.enter_context(server.accept()[0]).fileno()


def locked(stack: ExitStack, stranger: Stranger) -> int:
    return stack.enter_context(stranger.lock(7))


def held(stack: ExitStack, stranger: Stranger) -> int:
    return next((slot.descriptor for slot in stranger.service.slots._files._held), 0)


MAKERS = [*(lambda stack, _, make=make: make(stack) for make in FOREIGN.values())]
MAKERS += [*(lambda stack, _, make=make: make(stack) for make in (listening, unconnected, connected))]
MAKERS += 4 * [to_target, to_service, locked, held]

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8)
ANYTHING = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner))


def often(*values: object) -> st.SearchStrategy:
    return st.sampled_from(values) | st.sampled_from(values) | ANYTHING


NAME = SlotFiles(Path("/"), BUDGET, 1).name
MESSAGES = st.one_of(
    st.fixed_dictionaries({"protocol": often("echo")}),
    st.fixed_dictionaries(
        {"slot": often(f"{NAME}.0", f"{NAME}.7", f"{NAME}/7", f"{NAME}.\0"), "used": often(0, 1, -1, True)}
    ),
    st.fixed_dictionaries(
        {
            "ask": often(*(f"{NAME}.{FORM}.{n:08x}" for n in range(3))),
            "held": often(0, 1, -1, 1 << 70),
            "need": often(0, 1, -1, 1 << 70),
            "kind": often("kind", "other"),
            "process": often("1", "1 2", "9" * 30),
            "valid": often(0.01, 1.0, -1.0, math.nan, math.inf),
        }
    ),
    ANYTHING,
)
DATA = MESSAGES.map(lambda message: json.dumps(message).encode()) | st.binary(max_size=40) | st.just(b"[" * 4000)
THROWS = st.tuples(st.booleans(), DATA, st.lists(st.sampled_from(MAKERS), max_size=3))


def test_whatever_comes_nothing_is_raised_nothing_is_leaked_and_clients_are_served(stranger):
    @settings(max_examples=300, deadline=None)
    @given(st.lists(THROWS, max_size=6))
    def throw(throws):
        with all_closed():
            with ExitStack() as stack:
                for is_for_slots, data, makers in throws:
                    mailbox = stranger.slots_mailbox if is_for_slots else stranger.clients_mailbox
                    stranger.send(mailbox, data, [make(stack, stranger) for make in makers])
                gevent.sleep(0)
                with suppress(FileNotFoundError):
                    (stranger.folder / f"{NAME}.7").unlink()
            stranger.service.wait_ready()

    with Client(stranger.service.address) as client:
        assert client.ask(b"request") == b"request"
        throw()
        assert client.ask(b"request") == b"request"
