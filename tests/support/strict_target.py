"""An echo target in a process of its own that sees connections as a device does: in the order of the network.

A connection counts until its end has arrived in the kernel, whether it was read or not; so a new one that comes behind
the end of an old one is never one too many, however busy the machine is. Above the limit, a connection is refused.

Its last words, on standard output: the connections there were, the most at once, those refused.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class StrictTarget:
    """The process. Use it in a `with`; `told` is what it said at its end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.told: dict[str, Any] = {}

    def __enter__(self) -> StrictTarget:
        words = [sys.executable, "-m", "tests.support.strict_target", str(self.limit)]
        self._process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = ("127.0.0.1", int(self._process.stdout.readline()))
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        output, _ = self._process.communicate()
        self.told = json.loads(output)


def has_ended(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def serve(limit: int) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    reader, writer = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(writer, b"."))
    selector.register(reader, selectors.EVENT_READ)
    print(listening.getsockname()[1], flush=True)
    connections: set[socket.socket] = set()
    accepted = peak = refused = requests = 0
    while True:
        for key, _ in selector.select():
            if key.fileobj is listening:
                sock, _ = listening.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                there = sum(not has_ended(other) for other in connections) + 1
                accepted += 1
                peak = max(peak, there)
                if there > limit:
                    refused += 1
                    sock.close()
                    continue
                connections.add(sock)
                selector.register(sock, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket):
                sock = key.fileobj
                try:
                    data = sock.recv(65536)
                    if data:
                        sock.sendall(data)
                        requests += 1
                        continue
                except OSError:
                    pass
                selector.unregister(sock)
                connections.discard(sock)
                sock.close()
            else:
                told = {"accepted": accepted, "peak": peak, "refused": refused, "requests": requests}
                print(json.dumps(told), flush=True)
                return


if __name__ == "__main__":
    serve(int(sys.argv[1]))
