"""Real servers, each twice: one is asked directly, the other through the real `gmux server` with one connection."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gevent import socket, subprocess

from tests.peers.exchanges import AT_ONCE, LARGE, content, exchanges_of
from tests.support.programs import program, running
from tests.support.service import ROOT, Server, listening_port
from tests.support.wait import wait_until

#: Seconds for a program to start on a busy machine.
START = 20.0

#: Fields of one connection, and those by which each hop names itself.
OF_A_HOP = {"connection", "keep-alive", "proxy-connection", "te", "transfer-encoding", "via", "server", "date"}
#: Of what the target was asked, those that gmux answers or states anew.
OF_A_REQUEST = OF_A_HOP | {"host", "expect", "content-length"}
#: Of an answer, those by which the targets here tell the connections apart.
OF_AN_ANSWER = OF_A_HOP | {"x-peer", "x-open"}

Address = tuple[str, int]
Got = dict[str, Any]


def write_files(folder: Path) -> Path:
    folder.mkdir()
    (folder / "small").write_bytes(b"small\n")
    (folder / "large").write_bytes(content(LARGE))
    (folder / "text").write_bytes(content(50_000))
    for file in folder.iterdir():
        # nginx's ETag is made of it.
        os.utime(file, (1_000_000_000, 1_000_000_000))
    return folder


@contextmanager
def target(name: str, files: Path, folder: Path) -> Iterator[Address]:
    """The address of a target; `folder` is its own."""
    with ExitStack() as stack:
        if name == "nginx":
            yield stack.enter_context(nginx(files, folder))
            return
        words = {
            "gunicorn": [
                *(sys.executable, "-m", "gunicorn", "--bind=127.0.0.1:0", "--worker-class=gthread", "--threads=8"),
                # Longer than the tests, or a request may meet the close of an idle connection.
                *("--keep-alive=120", "--no-control-socket", "tests.peers.targets.wsgi_app:application"),
            ],
            "http.server-1.0": [sys.executable, "-m", "tests.peers.targets.http_server", "HTTP/1.0"],
            "http.server-1.1": [sys.executable, "-m", "tests.peers.targets.http_server", "HTTP/1.1"],
            "node": ["node", str(Path(__file__).parent / "targets" / "node.js")],
        }[name]
        words[0] = program(words[0], "nodejs" if name == "node" else "")
        process = stack.enter_context(running(words, {"PEER_FILES": str(files)}))
        port = wait_until(lambda: process.poll() is None and listening_port(process.pid), START, f"{name} listens")
        yield "127.0.0.1", port


@contextmanager
def nginx(files: Path, folder: Path) -> Iterator[Address]:
    """nginx takes no port 0: a port that was free a moment ago is tried, and another one if that is taken by now."""
    command = program("nginx", "nginx-light")
    for _ in range(10):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        (folder / "nginx.conf").write_text(configure(port, files, folder))
        with running([command, "-p", str(folder), "-c", "nginx.conf", "-e", f"{folder}/error.log"]) as process:
            wait_until(lambda p=process: p.poll() is not None or listening_port(p.pid), START, "nginx listens")
            if process.poll() is None:
                yield "127.0.0.1", port
                return
    raise AssertionError(f"nginx does not start: {(folder / 'error.log').read_text()}")


def configure(port: int, files: Path, folder: Path) -> str:
    """One process, which is no daemon, keeps all it writes in `folder`, and is who runs the tests."""
    numbers = range(60)
    peer = "add_header X-Peer $remote_port always; add_header X-Open $connections_active always;"
    given = ",".join(f'["X-F{n}","$http_x_f{n}"]' for n in numbers)
    told = f'{{"method":"$request_method","target":"$request_uri","fields":[["Accept","$http_accept"],{given}]}}'
    temporary = " ".join(
        f"{name}_temp_path {folder}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    return f"""
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    {temporary}
    access_log off;
    default_type text/plain;
    # Longer than the tests, or a request may meet the close of an idle connection.
    keepalive_timeout 120s;
    absolute_redirect off;
    client_max_body_size 2500k;
    # Else a request with Via, which a proxy has to write, gets no gzip.
    gzip_proxied any;
    server {{
        listen 127.0.0.1:{port};
        {peer}
        location / {{ root {files}; }}
        location = /gzip {{ alias {files}/text; gzip on; gzip_vary on; }}
        location = /none {{ return 204; }}
        location = /moved {{ return 302 /small; }}
        location = /echo {{ return 200 "$request_method"; }}
        location = /tell {{ return 200 '{told}'; }}
        location = /fields {{ {peer} {" ".join(f'add_header X-F{n} "value {n}";' for n in numbers)} return 200; }}
        location /token/ {{ return 200 $uri; }}
        location /store/ {{ root {folder}; dav_methods PUT DELETE; create_full_put_path on; }}
    }}
}}
"""


class Pair:
    """A target twice, and gmux before the second."""

    def __init__(self, name: str, direct: Address, server: Server) -> None:
        self.name = name
        self.direct = direct
        self.server = server


@contextmanager
def start(name: str, folder: Path) -> Iterator[Pair]:
    with ExitStack() as stack:
        files = write_files(folder / "files")
        own = [folder / "direct", folder / "through"]
        for place in own:
            place.mkdir()
        direct, behind = [stack.enter_context(target(name, files, place)) for place in own]
        yield Pair(name, direct, stack.enter_context(Server(behind, protocol="http", pool_size="1")))


def url(address: Address) -> str:
    return "http://{}:{}".format(*address)


class Answers:
    """What a client got at both addresses, by the names of the exchanges, and what gmux said of it meanwhile."""

    def __init__(self, client: str, pair: Pair) -> None:
        log = pair.server.log
        before = len(log)
        told = run_client(client, pair)
        names = [exchange.name for exchange in exchanges_of(pair.name)]
        self.direct, self.through = [dict(zip(names, results, strict=True)) for results in told["results"]]
        self.at_once: list[Got] = told["at_once"]
        # Those that asked at once came last, so all lines before theirs are there then.
        wait_until(lambda: connections(log[before:]) > AT_ONCE, what=f"lines of the log on {AT_ONCE + 1} clients")
        self.log = log[before:]
        self.connections = connections(self.log)


def connections(log: list[str]) -> int:
    """How many clients have connected."""
    return len([line for line in log if re.search(r"\] #\d+: ", line)])


def run_client(client: str, pair: Pair) -> Got:
    """What the client got: `direct` and `through` by the names of the exchanges, and the tokens asked `at_once`."""
    if client == "curl":
        program("curl")
    done = subprocess.run(
        [sys.executable, "-m", "tests.peers.client", client, pair.name, url(pair.direct), url(pair.server.address)],
        cwd=ROOT,
        capture_output=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)
