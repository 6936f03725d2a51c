"""Sockets as gmux uses them: non-blocking, without Nagle's delay, with keepalive, closed on exec.

A Unix socket has neither delay nor keepalive, and no reset either: what was written to it is with the peer at once, and
its end comes behind that, however it was closed. Only a close with bytes unread is told from others.

Nothing here is monkey-patched: the sockets are the standard library's, and waiting is done by watchers of the loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import termios
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address

import gevent
from gevent import socket as gevent_socket

from gmux.errors import ConnectError, ConnectTimeout, StartError
from gmux.kinds import Address as Address

#: One read takes at most this much. From 128 KiB on each would cost an mmap and its page faults; below, to receive into
#: a buffer of our own and copy out of it is slower (measured: 2.35 us against 2.20 us for 64 bytes sent and received).
READ_SIZE = 64 * 1024

#: A peer that vanished without a word (power, cable) is noticed after 60 + 6 x 10 seconds of silence; the kernel's own
#: default is more than two hours. Seconds, seconds, probes.
KEEPALIVE = (60, 10, 6)

BACKLOG = 2048

#: Seconds for which a connection still counts that was cut off with a reset: a program sees that when it next looks.
RESET_PATIENCE = 0.25

#: Seconds between two attempts to connect to a Unix socket whose backlog is full: the first, doubled until the longest.
UNIX_PAUSE = 0.001
MAX_UNIX_PAUSE = 0.05

#: The state of a TCP socket that is no connection any more, in struct tcp_info (linux/tcp.h, net/tcp_states.h).
TCP_CLOSE = 7

IPV4_MAPPED = "::ffff:"


#: What the kernel gives as a name: host and port, two more numbers for IPv6; of a Unix socket its path, often empty.
Name = tuple[str, int] | tuple[str, int, int, int] | str


def format_host(name: Name) -> str:
    """The host alone, empty for a Unix socket; an IPv4 client of an IPv6 socket is shown as what it is."""
    return "" if isinstance(name, str) else name[0].removeprefix(IPV4_MAPPED)


def format_address(name: Name) -> str:
    """`host:port`, `[host]:port` for IPv6, `unix:path` for a Unix socket."""
    if isinstance(name, str):
        return "unix:" + name
    host, port = format_host(name), name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_peer(sock: socket.socket, name: Name) -> str:
    """Who is at the other end, whose name is `name`. Clients of a Unix socket have none: they are told by process."""
    if not isinstance(name, str):
        return format_address(name)
    pid, _, _ = struct.unpack("iii", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    # A process that has ended, or is in another container, has no number here.
    return f"{format_address(name or sock.getsockname())} (process {pid or '?'})"


def format_ends(sock: socket.socket, connecting: Name, listening: Name) -> str:
    """Both ends of a connection; of a Unix socket they have one name between them."""
    if isinstance(listening, str):
        return format_peer(sock, listening)
    return f"{format_address(connecting)} <-> {format_address(listening)}"


def prepare(sock: socket.socket) -> None:
    """Set what every connection gets, whichever side it is on."""
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, count = KEEPALIVE
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)


def listen(address: Address, mode: int = 0o660, owner: tuple[int, int] | None = None) -> socket.socket:
    """A listening socket at `address`; an empty host is all addresses, IPv6 and IPv4. Raises StartError.

    The file of a Unix socket gets `mode`, and `owner`: a user and a group, -1 for as it is. It replaces a socket on
    which nobody listens any more, and no other file.
    """
    try:
        return _listen_unix(address, mode, owner) if isinstance(address, str) else _listen_tcp(*address)
    except OSError as error:
        where = address if isinstance(address, str) else (address[0] or "*", address[1])
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise StartError(f"cannot listen on {format_address(where)}: {reason}") from None


def _listen_tcp(host: str, port: int) -> socket.socket:
    # An address with a scope or a name resolves here; the first answer is taken, as a listener is one socket.
    family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    if not host:
        dual = socket.has_dualstack_ipv6()
        return socket.create_server(
            ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=BACKLOG, dualstack_ipv6=dual
        )
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def _listen_unix(path: str, mode: int, owner: tuple[int, int] | None) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    try:
        _bind(sock, path, mode)
        file = SocketFile(path)
        try:
            if owner is not None:
                _give(path, owner)
            # Until here nobody can connect, so all is as it shall be from the first client on.
            sock.listen(BACKLOG)
        except BaseException:
            file.remove()
            raise
        if not file.is_there():
            # Another gmux that starts at the same time took it for the one that was left behind.
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
    except BaseException:
        sock.close()
        raise
    return sock


def _bind(sock: socket.socket, path: str, mode: int) -> None:
    """Make the file of `sock`. Raises OSError, StartError."""
    # Not changed afterwards by its name, which may be another file's by then. The umask alone would not do in a folder
    # with an access control list of its own.
    os.fchmod(sock.fileno(), mode)
    umask = os.umask(~mode & 0o777)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
    finally:
        os.umask(umask)


def _remove_stale(path: str) -> None:
    """Remove a socket on which nobody listens. Raises OSError, StartError for any other file."""
    # Held open, or the number of the file, once another gmux has removed it, would be that of its successor.
    try:
        held = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        file = SocketFile(path)
        if not file.is_socket:
            raise StartError(f"cannot listen on {format_address(path)}: a file that is not a socket is there")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            answer = probe.connect_ex(path)
        if answer != errno.ECONNREFUSED:
            reason = answer if answer == errno.EACCES else errno.EADDRINUSE
            raise OSError(reason, os.strerror(reason))
        if file.is_there():
            os.unlink(path)
    finally:
        os.close(held)


def _give(path: str, owner: tuple[int, int]) -> None:
    try:
        os.chown(path, *owner, follow_symlinks=False)
    except OSError as error:
        reason = f"cannot change its owner (--listen-owner): {error.strerror}"
        raise StartError(f"cannot listen on {format_address(path)}: {reason}") from None


class SocketFile:
    """The file of a Unix socket, told from another of its name that comes later.

    Made while the socket is open, which keeps the file's number from being given to another; used as long as it is.
    Raises OSError.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._status = os.lstat(path)

    @property
    def is_socket(self) -> bool:
        return stat.S_ISSOCK(self._status.st_mode)

    def is_there(self) -> bool:
        try:
            return os.path.samestat(self._status, os.lstat(self._path))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file, unless another has its name; never raises: what is left, the next start replaces."""
        if self.is_there():
            with suppress(OSError):
                os.unlink(self._path)


def connect(address: Address, seconds: float) -> socket.socket:
    """A connection to `address`, made in `seconds` at most, or for ever when they are 0; switches greenlets.

    Raises ConnectTimeout, ConnectError.
    """
    where = format_address(address)
    try:
        with gevent.Timeout(seconds or None):
            sock = _connect_unix(address) if isinstance(address, str) else _connect_tcp(address)
    except gevent.Timeout:
        limit = f"{seconds:g} s (--connect-timeout)"
        raise ConnectTimeout(f"the target {where} did not take the connection within {limit}") from None
    except OSError as error:
        raise ConnectError(f"cannot connect to the target {where}: {error.strerror or error}") from None
    prepare(sock)
    return sock


def _connect_tcp(address: tuple[str, int]) -> socket.socket:
    """Raises OSError."""
    connected = gevent_socket.create_connection(address)
    sock = socket.socket(fileno=connected.detach())
    if _is_own_end(sock):
        prepare_reset(sock)
        sock.close()
        raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    return sock


def _connect_unix(path: str) -> socket.socket:
    """The kernel says at once whether there is a connection, or that the target's backlog is full. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.setblocking(False)
        pause = UNIX_PAUSE
        while True:
            try:
                sock.connect(path)
            except BlockingIOError:
                # The target accepts the next one in milliseconds, mostly, and no event tells of that.
                gevent.sleep(pause)
                pause = min(2 * pause, MAX_UNIX_PAUSE)
            else:
                return sock
    except BaseException:
        sock.close()
        raise


def _is_own_end(sock: socket.socket) -> bool:
    """Whether the connection is one to itself.

    Where nobody listens at a port of this machine, the kernel may pick that port for the attempt: the two ends are one
    socket then, and each request would be its own answer.
    """
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:
        return False  # it has ended already; who uses it finds out


def open_stream(descriptor: int, *families: socket.AddressFamily) -> socket.socket | None:
    """The stream socket that a descriptor of another process is; None: it is something else, and stays open."""
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError:
        return None
    if sock.type == socket.SOCK_STREAM and sock.family in families:
        return sock
    sock.detach()
    return None


def local_port(sock: socket.socket) -> int:
    """The port of its own side, which a listener and the connections to it have in common; 0 for a Unix socket."""
    name = sock.getsockname()
    # A Unix socket has a path, or the bytes of an abstract name, which may be a single one.
    return int(name[1]) if isinstance(name, tuple) else 0


def leads_to(sock: socket.socket, address: Address) -> bool:
    """Whether a connection is one to `address`, as far as its own names tell. Raises OSError when it has ended."""
    name = sock.getpeername()
    if isinstance(address, str):
        return sock.family == socket.AF_UNIX
    if sock.family == socket.AF_UNIX or sock.proto != socket.IPPROTO_TCP or name[1] != address[1]:
        return False
    wanted = _parse_ip(address[0])
    # What a name stands for may have changed since, and the host 0.0.0.0 is this machine.
    return wanted is None or wanted.is_unspecified or wanted == _parse_ip(name[0])


def _parse_ip(host: str) -> IPv4Address | IPv6Address | None:
    """None: it is a name. An IPv4 address of IPv6 is what it stands for, and a scope does not count."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that the kernel has taken for the peer, and the peer has not acknowledged (SIOCOUTQ, tcp(7)).

    None on a Unix socket: they are with the peer, and a close does not take them back.
    """
    if sock.family == socket.AF_UNIX:
        return 0
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 0  # the connection is gone


def is_over(sock: socket.socket) -> bool:
    """Whether the kernel has nothing left to do for a connection whose two sides have ended: the peer has our FIN.

    On a Unix socket the peer has it at once.
    """
    if sock.family == socket.AF_UNIX:
        return True
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE
    except OSError:
        return True  # the connection is gone


def acknowledge(sock: socket.socket) -> None:
    """Acknowledge at once what has come. A target that writes an answer in two pieces, with Nagle's delay, sends the
    second one only then; the kernel would wait some 40 ms for something to send it with."""
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
    except OSError as error:
        # A Unix socket, which delays nothing. To ask beforehand what it is would cost each TCP connection.
        if error.errno != errno.EOPNOTSUPP:
            raise


def prepare_reset(sock: socket.socket) -> None:
    """Make the close of `sock` a reset, so that the peer cannot take what came so far for a complete message.

    A Unix socket has none: there only the framing tells that a message is not whole.
    """
    _set_linger(sock, True)


def prepare_close(sock: socket.socket) -> None:
    """Take `prepare_reset` back."""
    _set_linger(sock, False)


def _set_linger(sock: socket.socket, is_on: bool) -> None:
    with suppress(OSError):  # the connection is gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_on, 0))
