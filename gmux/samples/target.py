"""What the sample targets share: a limit of connections, a time of service, a line about each connection.

A target gives each connection a greenlet that reads, answers and reads again, in plain blocking style. Nothing that a
peer does (reset, garbage, half a message) raises out of that greenlet: it ends the connection, if need be with a line.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import gevent
from gevent.server import StreamServer

from gmux import net
from gmux.codecs.base import Limits, Request
from gmux.codecs.framed import FramedCodec
from gmux.errors import FramingError


class Target(StreamServer):  # type: ignore[misc]
    """A target for one protocol; subclasses define `converse`. Its maker calls `start()`; `stop()` ends accepting.

    address          where to listen, from the beginning; port 0 is any free one, which `self.address` then has
    max_connections  served at once; one more is accepted and closed without a byte
    delay            seconds of service for each message
    report           takes a line about a connection that came, was refused or broke the protocol; must not switch

    Raises StartError.
    """

    #: The protocol of gmux that the target speaks.
    protocol: str

    def __init__(
        self,
        address: net.Address,
        max_connections: int = 1,
        delay: float = 0.0,
        report: Callable[[str], None] = lambda line: None,
        **options: Any,
    ) -> None:
        listening = net.listen(address)
        listening.setblocking(False)
        super().__init__(listening, **options)
        self.max_connections = max_connections
        # Not `delay`: that is gevent's pause after a failed accept.
        self.service_time = delay
        self.report = report
        #: Connections served so far, and of these the ones open now; connections refused so far.
        self.served = 0
        self.open = 0
        self.refused = 0

    def handle(self, sock: Any, address: Any) -> None:
        """Serve one connection to its end, or refuse it; switches greenlets. gevent closes `sock` afterwards."""
        peer = net.format_address(address)
        # The limit is looked at here and not in the accept callback: an open connection whose end came in the same
        # turn of the loop is counted off by now, so a peer may close one and open the next at once.
        if self.open >= self.max_connections:
            self.refused += 1
            self.report(f"refused: {peer}, {self.open} {'connection is' if self.open == 1 else 'connections are'} open")
            return
        self.open += 1
        self.served += 1
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.report(f"{self.served}: {net.format_address(sock.getsockname())} <-> {peer}")
            self.converse(sock, address)
        except FramingError as error:
            self.report(f"closed: {peer}, {error}")
        except OSError:
            # The peer is gone, which ends a connection as well as any other way.
            pass
        finally:
            self.open -= 1

    def converse(self, sock: Any, address: Any) -> None:
        """Answer what comes on `sock` until its peer ends; switches greenlets. Raises OSError, FramingError."""
        raise NotImplementedError

    def work(self) -> None:
        """Let the time of service of one message pass; switches greenlets when there is one."""
        if self.service_time:
            gevent.sleep(self.service_time)


class FrameTarget(Target):
    """A target that answers each frame with one frame, in order. Subclasses set `codec_class` and define `answer`."""

    codec_class: type[FramedCodec]

    def converse(self, sock: Any, address: Any) -> None:
        decoder = self.codec_class(Limits()).request_decoder()
        while data := sock.recv(net.READ_SIZE):
            decoder.receive_data(data)
            while (request := decoder.next_event()) is not None:
                if isinstance(request, Request):  # else it needs no answer
                    self.work()
                    sock.sendall(self.answer(request.data))
            sock.sendall(decoder.take_owed())

    def answer(self, frame: bytes) -> bytes:
        """The frame that answers `frame`; does not switch. Raises FramingError."""
        raise NotImplementedError
