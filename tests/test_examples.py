"""The scripts in examples/, as processes."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SECONDS = 40.0


class Server:
    """A running example server and the port it listens on."""

    def __init__(self, script, *words):
        command = [sys.executable, str(EXAMPLES / script), "--port", "0", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        self.greeting = self.read_line()
        self.port = int(re.search(r"127\.0\.0\.1:([0-9]+)", self.greeting)[1])

    def read_line(self):
        """The next line of standard output, in time."""
        end = time.monotonic() + SECONDS
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no line in {SECONDS} s, only {line!r}"
            byte = os.read(self.process.stdout.fileno(), 1)
            assert byte, f"ended after {line!r}: {self.process.stderr.read()!r}"
            line += byte
        return line.decode().rstrip("\n")

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), SECONDS)

    def end(self, number=signal.SIGTERM):
        """The exit code and what was printed to standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, errors.decode()


@pytest.fixture
def serve():
    servers = []

    def serve(script, *words):
        servers.append(Server(script, *words))
        return servers[-1]

    yield serve
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate(timeout=SECONDS)


def run(script, *words, text=""):
    command = [sys.executable, str(EXAMPLES / script), *words]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS)


def is_closed(sock):
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def test_echo_server_answers_prints_and_refuses_the_second(serve):
    server = serve("echo_server.py")
    assert server.greeting == f"echo target listening on 127.0.0.1:{server.port}, connections: 1 at most"
    with server.connect() as first, server.connect() as second:
        first.sendall(b"hello\n")
        assert first.recv(100) == b"hello\n"
        assert server.read_line() == f"1: 127.0.0.1:{server.port} <-> 127.0.0.1:{first.getsockname()[1]}"
        assert is_closed(second)
        refused = f"refused: 127.0.0.1:{second.getsockname()[1]}, 1 connection is open"
        assert server.read_line() == refused
    assert server.end(signal.SIGINT) == (0, "")


def test_echo_server_takes_a_limit_and_a_delay(serve):
    server = serve("echo_server.py", "--max-connections", "2", "--delay", "50ms")
    with server.connect() as first, server.connect() as second:
        begin = time.monotonic()
        second.sendall(b"2\n")
        assert second.recv(100) == b"2\n"
        assert time.monotonic() - begin >= 0.05
        first.sendall(b"1\n")
        assert first.recv(100) == b"1\n"


def test_http_server_answers_and_refuses_the_second(serve):
    server = serve("http_server.py")
    browser = HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)
    browser.request("GET", "/status/418")
    response = browser.getresponse()
    assert (response.status, response.read()) == (418, b"418 I'm a Teapot\n")
    with server.connect() as second:
        assert is_closed(second)
    browser.close()
    assert server.end() == (0, "")


@pytest.mark.parametrize("header", ["binary", "digits"])
def test_iso8583_client_and_server_understand_each_other(serve, header):
    server = serve("iso8583_server.py", "--header", header)
    commands = "echo\n\nbuy 12.50\nsend t=0100 3=000000 11=000007\nquit\necho\n"
    client = run("iso8583_client.py", "--header", header, str(server.port), text=commands)
    assert (client.returncode, client.stderr) == (0, "")
    types = re.findall(r"^(sent|received):\nt .*'([0-9]{4})'$", client.stdout, re.MULTILINE)
    assert types == [
        ("sent", "0800"),
        ("received", "0810"),
        ("sent", "0200"),
        ("received", "0210"),
        ("sent", "0100"),
        ("received", "0110"),
    ]
    assert "'000000001250'" in client.stdout
    assert "'411111******1111'" in client.stdout
    assert "4111111111111111" not in client.stdout
    assert server.read_line().startswith("1: ")


def test_iso8583_client_mistakes_are_told_and_the_rest_is_sent(serve):
    server = serve("iso8583_server.py")
    commands = "spam\nbuy 1.5\nbuy 1 abc\nsend t=08\nsend spam=1\nsend t\nsend\necho\n"
    client = run("iso8583_client.py", str(server.port), text=commands)
    assert client.returncode == 1
    assert len(client.stderr.splitlines()) == 7
    assert client.stdout.count("received:") == 1


def test_iso8583_client_refused_connection_is_one_line(serve):
    server = serve("iso8583_server.py")
    with server.connect():
        assert server.read_line().startswith("1: ")
        client = run("iso8583_client.py", str(server.port), text="echo\n")
    assert client.returncode == 1
    assert client.stderr.startswith("iso8583_client.py: ")
    assert len(client.stderr.splitlines()) == 1


def test_iso8583_client_silent_target_is_given_up(serve):
    server = serve("iso8583_server.py", "--delay", "1m")
    client = run("iso8583_client.py", "--timeout", "50ms", str(server.port), text="echo\n")
    assert (client.returncode, client.stderr) == (1, "iso8583_client.py: no answer within 0.05 s\n")


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("echo_server.py", ["--spam"], "--spam is unknown or given twice; see --help"),
        ("echo_server.py", ["spam"], "spam is unknown or given twice; see --help"),
        ("echo_server.py", ["--port"], "--port requires argument; see --help"),
        ("http_server.py", ["--port", "70000"], "--port: '70000' is not allowed: a port from 0 to 65535"),
        ("http_server.py", ["--port", "x:80"], "--port: 'x:80' is not allowed: a port from 0 to 65535"),
        (
            "http_server.py",
            ["--max-connections", "0"],
            "--max-connections: '0' is not allowed: a number from 1 to 9999",
        ),
        ("iso8583_server.py", ["--header", "x"], "--header: 'x' is not allowed: binary or digits"),
        ("iso8583_server.py", ["--delay", "x"], "--delay: 'x' is not allowed: a time such as 500ms or 10s"),
        ("iso8583_client.py", ["x:y"], "ADDRESS: 'x:y' is not allowed: PORT, HOST:PORT or [IPV6]:PORT"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_2(script, words, said):
    ended = run(script, *words)
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"{script}: {said}\n")


def test_port_in_use_is_one_line_and_exit_1():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        ended = run("echo_server.py", "--port", str(port))
    said = f"echo_server.py: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", said)
