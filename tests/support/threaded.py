"""A target in threads of its own, for tests that wait for a process without the loop of gevent."""

from __future__ import annotations

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loadtest.protocols import Protocol


@contextmanager
def target(protocol: Protocol, answer_to: Callable[[bytes], bytes]) -> Iterator[str]:
    """A target that says `answer_to(request)`, or closes when that is nothing; its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            buffer = bytearray()
            while data := self.request.recv(65536):
                buffer += data
                while request := protocol.cut(buffer):
                    if not (answer := answer_to(request)):
                        return
                    self.request.sendall(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        serving.join()
