"""Sockets as gmux uses them: non-blocking, without Nagle's delay, with keepalive, closed on exec.

Nothing here is monkey-patched: the sockets are the standard library's, and waiting is done by watchers of the loop.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import termios
from contextlib import suppress

import gevent
from gevent import socket as gevent_socket

from gmux.errors import ConnectError, ConnectTimeout, StartError

Address = tuple[str, int]

#: One read takes at most this much. From 128 KiB on each would cost an mmap and its page faults; below, to receive into
#: a buffer of our own and copy out of it is slower (measured: 2.35 us against 2.20 us for 64 bytes sent and received).
READ_SIZE = 64 * 1024

#: A peer that vanished without a word (power, cable) is noticed after 60 + 6 x 10 seconds of silence; the kernel's own
#: default is more than two hours. Seconds, seconds, probes.
KEEPALIVE = (60, 10, 6)

BACKLOG = 2048

IPV4_MAPPED = "::ffff:"


def format_host(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """The host alone; an IPv4 client of an IPv6 socket is shown as what it is."""
    return address[0].removeprefix(IPV4_MAPPED)


def format_address(address: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """`host:port`, `[host]:port` for IPv6."""
    host, port = format_host(address), address[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def prepare(sock: socket.socket) -> None:
    """Set what every connection gets, whichever side it is on."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, count = KEEPALIVE
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, count)


def listen(address: Address) -> socket.socket:
    """A listening socket at `address`; an empty host is all addresses, IPv6 and IPv4. Raises StartError."""
    host, port = address
    try:
        # An address with a scope or a name resolves here; the first answer is taken, as a listener is one socket.
        family = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        if not host:
            dual = socket.has_dualstack_ipv6()
            return socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=BACKLOG, dualstack_ipv6=dual
            )
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        raise StartError(f"cannot listen on {format_address((host or '*', port))}: {reason}") from None


def connect(address: Address, seconds: float) -> socket.socket:
    """A connection to `address`, made in `seconds` at most, or for ever when they are 0; switches greenlets.

    Raises ConnectTimeout, ConnectError.
    """
    where = format_address(address)
    try:
        with gevent.Timeout(seconds or None):
            connected = gevent_socket.create_connection(address)
    except gevent.Timeout:
        limit = f"{seconds:g} s (--connect-timeout)"
        raise ConnectTimeout(f"the target {where} did not take the connection within {limit}") from None
    except OSError as error:
        raise ConnectError(f"cannot connect to the target {where}: {error.strerror or error}") from None
    sock = socket.socket(fileno=connected.detach())
    if _is_own_end(sock):
        prepare_reset(sock)
        sock.close()
        raise ConnectError(f"cannot connect to the target {where}: {os.strerror(errno.ECONNREFUSED)}")
    prepare(sock)
    return sock


def _is_own_end(sock: socket.socket) -> bool:
    """Whether the connection is one to itself.

    Where nobody listens at a port of this machine, the kernel may pick that port for the attempt: the two ends are one
    socket then, and each request would be its own answer.
    """
    try:
        return bool(sock.getsockname() == sock.getpeername())
    except OSError:
        return False  # it has ended already; who uses it finds out


def unacknowledged(sock: socket.socket) -> int:
    """Bytes that the kernel has taken for the peer, and the peer has not acknowledged (SIOCOUTQ, tcp(7))."""
    try:
        return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])
    except OSError:
        return 0  # the connection is gone


def acknowledge(sock: socket.socket) -> None:
    """Acknowledge at once what has come. A target that writes an answer in two pieces, with Nagle's delay, sends the
    second one only then; the kernel would wait some 40 ms for something to send it with."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def prepare_reset(sock: socket.socket) -> None:
    """Make the close of `sock` a reset, so that the peer cannot take what came so far for a complete message."""
    _set_linger(sock, True)


def prepare_close(sock: socket.socket) -> None:
    """Take `prepare_reset` back."""
    _set_linger(sock, False)


def _set_linger(sock: socket.socket, is_on: bool) -> None:
    with suppress(OSError):  # the connection is gone already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_on, 0))
