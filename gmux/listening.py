"""The listening sockets of a service, one for each route: opened at the start, kept over a reload, handed on.

gunicorn never binds, removes or replaces them: it gets them ready made, in the order of the routes.

    own             opened here for the address of a route. It serves the route of that address, also after a reload
                    and in the master of an upgrade. The file of a Unix socket is removed at the last stop.
    activated       opened by systemd. It serves the route of its name, else that of its address; one alone serves the
                    only route. It is open as long as there is a master.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from gmux import net, systemd
from gmux.config import RouteConfig
from gmux.errors import StartError

#: Hands the sockets to the master of an upgrade. Not GMUX_...: those are settings.
HANDED_OVER = "SOCKETS_OF_GMUX"


@dataclass(frozen=True, eq=False)
class Held:
    """An open socket. `address` is as configured; of an activated one it is where it listens, and `name` is given.

    `file` is that of a Unix socket, when it is ours to remove.
    """

    sock: socket.socket
    address: str
    name: str | None = None
    file: net.SocketFile | None = None


class Listening:
    """Made by the master, which alone opens and closes; workers have copies."""

    def __init__(self, held: Iterable[Held] = ()) -> None:
        self._held = list(held)

    @property
    def sockets(self) -> list[socket.socket]:
        return [held.sock for held in self._held]

    def fit(self, routes: Sequence[RouteConfig]) -> list[Held]:
        """A socket for each route, of those that are open or newly opened; nothing else changes before `use`.

        Raises StartError.
        """
        fitting = _place([held for held in self._held if held.name is not None], routes)
        own = [held for held in self._held if held.name is None]
        opened: list[Held] = []
        try:
            for n, route in enumerate(routes):
                if n in fitting:
                    continue
                address = net.format_address(route.listen)
                fitting[n] = next((held for held in own if held.address == address), None) or _open(route, opened)
                if fitting[n] in own:
                    own.remove(fitting[n])
        except StartError:
            for held in opened:
                _close(held, removes=True)
            raise
        return [fitting[n] for n in range(len(routes))]

    def use(self, fitting: Sequence[Held]) -> None:
        """Serve with what `fit` found; the others are closed."""
        for held in self._held:
            if held not in fitting:
                _close(held, removes=True)
        self._held = list(fitting)

    def give_up(self, fitting: Sequence[Held]) -> None:
        """Close what `fit` has opened: it will not be used."""
        for held in fitting:
            if held not in self._held:
                _close(held, removes=True)

    def close(self, *, is_last: bool) -> None:
        """Close all. Unless it is the last master, another one listens at the same files."""
        for held in self._held:
            _close(held, removes=is_last)
        self._held = []

    def hand_over(self) -> str:
        """Let the next `exec` of this process keep the sockets; the value of HANDED_OVER for it."""
        for sock in self.sockets:
            sock.set_inheritable(True)
        sockets = [(held.sock.fileno(), held.address, held.name) for held in self._held]
        return json.dumps({"pid": os.getpid(), "sockets": sockets})


def inherited() -> tuple[list[Held], bool]:
    """The sockets that this process was started with, and whether an old master handed them over.

    The variables that tell are removed. Raises StartError.
    """
    handed_over, activated = os.environ.pop(HANDED_OVER, ""), systemd.activated()
    with suppress(ValueError, TypeError, KeyError):
        message = json.loads(handed_over)
        # Whoever else has the variable has inherited it, but not the sockets.
        if message["pid"] == os.getpid():
            sockets = ((_take(fd), address, name) for fd, address, name in message["sockets"])
            return [_hold(sock, address, name) for sock, address, name in sockets if sock is not None], True
    # gunicorn would believe them.
    for variable in ("GUNICORN_PID", "GUNICORN_FD"):
        os.environ.pop(variable, None)
    taken = ((_take(fd), name) for fd, name in activated)
    return [Held(sock, net.format_address(sock.getsockname()), name) for sock, name in taken if sock is not None], False


def _take(fd: int) -> socket.socket | None:
    """The listening socket behind the descriptor; None: there is no socket. Raises StartError."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
    except OSError:
        return None
    sock = socket.socket(fileno=fd)
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise StartError(f"the socket of descriptor {fd}, handed to gmux at its start, is no listening stream socket")
    sock.set_inheritable(False)
    return sock


def _place(activated: Sequence[Held], routes: Sequence[RouteConfig]) -> dict[int, Held]:
    """The activated sockets by the number of their route. Raises StartError."""
    is_only = len(activated) == len(routes) == 1
    tests: tuple[Callable[[Held, RouteConfig], bool], ...] = (
        lambda held, route: held.name == route.name,
        _is_at,
        lambda held, route: is_only,
    )
    placed: dict[int, Held] = {}
    left = list(activated)
    for test in tests:
        for held in list(left):
            for n, route in enumerate(routes):
                if n not in placed and test(held, route):
                    placed[n] = held
                    left.remove(held)
                    break
    for held in left:
        names = ", ".join(route.name for route in routes if route.name) or "which need names"
        raise StartError(
            f"no route is left for the socket {held.address} of systemd (FileDescriptorName={held.name}): name it"
            f" after one of the routes, {names}"
        )
    return placed


def _is_at(held: Held, route: RouteConfig) -> bool:
    if isinstance(route.listen, str):
        return held.address == net.format_address(route.listen)
    host, port = route.listen
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        return False
    return any(held.address == net.format_address((str(name[0]), int(name[1]))) for *_, name in found)


def _open(route: RouteConfig, opened: list[Held]) -> Held:
    sock = net.listen(route.listen, route.listen_mode, route.listen_owner)
    held = _hold(sock, net.format_address(route.listen), None)
    opened.append(held)
    return held


def _hold(sock: socket.socket, address: str, name: str | None) -> Held:
    path = sock.getsockname()
    if name is None and isinstance(path, str):
        with suppress(OSError):  # somebody has removed it
            return Held(sock, address, name, net.SocketFile(path))
    return Held(sock, address, name)


def _close(held: Held, *, removes: bool) -> None:
    if removes and held.file is not None:
        held.file.remove()
    held.sock.close()
