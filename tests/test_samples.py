"""The sample targets, in process and over real sockets."""

import json
import socket
import struct
import time
from http.client import HTTPConnection, HTTPResponse

import gevent
import iso8583
import pytest
from gevent import socket as gevent_socket
from iso8583.specs import default_ascii as SPEC

from gmux import samples
from gmux.errors import ConfigError, StartError
from gmux.samples.echo import EchoTarget
from gmux.samples.http import HttpTarget, numbered_lines
from gmux.samples.iso8583 import Iso8583Target, MpuTarget

SECONDS = 20.0
CARD = "4111111111111111"


@pytest.fixture(autouse=True)
def _deadline_and_silence(capfd):
    """Every test ends in time, and nothing that it did left a traceback."""
    with gevent.Timeout(2 * SECONDS):
        yield
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture
def start():
    """Starts targets, and stops them."""
    targets = []

    def start(target_class, max_connections=1, delay=0.0):
        lines = []
        target = target_class(("127.0.0.1", 0), max_connections, delay, lines.append)
        target.lines = lines
        target.start()
        targets.append(target)
        return target

    yield start
    for target in targets:
        target.stop()


@pytest.fixture
def connect():
    """Connects to addresses, and closes what is left open."""
    socks = []

    def connect(address):
        sock = gevent_socket.create_connection(address, SECONDS)
        socks.append(sock)
        return sock

    yield connect
    for sock in socks:
        sock.close()
    gevent.sleep(0)


def receive(sock, size):
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        assert piece, f"closed after {data!r}"
        data += piece
    return data


def ask(sock, message):
    """What an echo target answers to `message`."""
    sock.sendall(message)
    return receive(sock, len(message))


def is_closed(sock):
    """Waits for the end of what the peer sends: true when nothing came before."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def wait_until(condition):
    while not condition():
        gevent.sleep(0.001)


def reset(sock):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


# --- connections


def test_limit_connection_above_is_closed_and_reported(start, connect):
    target = start(EchoTarget, max_connections=2)
    first, second = connect(target.address), connect(target.address)
    assert ask(first, b"1\n") == b"1\n"
    assert ask(second, b"2\n") == b"2\n"
    third = connect(target.address)
    host, port = third.getsockname()
    assert is_closed(third)
    assert target.lines[-1] == f"refused: {host}:{port}, 2 connections are open"
    assert (target.served, target.open, target.refused) == (2, 2, 1)
    assert ask(first, b"3\n") == b"3\n"


def test_limit_connection_closed_and_next_opened_at_once_is_served(start, connect):
    target = start(EchoTarget)
    for _ in range(50):
        sock = connect(target.address)
        assert ask(sock, b"x\n") == b"x\n"
        sock.close()
    assert (target.served, target.refused) == (50, 0)


def test_connection_line_names_both_ends(start, connect):
    target = start(EchoTarget)
    sock = connect(target.address)
    ask(sock, b"x\n")
    (here, there) = sock.getsockname(), target.address
    assert target.lines == [f"1: {there[0]}:{there[1]} <-> {here[0]}:{here[1]}"]


@pytest.mark.parametrize("target_class", [EchoTarget, HttpTarget, Iso8583Target, MpuTarget])
def test_peer_resets_in_a_message_target_serves_the_next(start, connect, target_class):
    target = start(target_class)
    sock = connect(target.address)
    sock.sendall(b"0")
    wait_until(lambda: target.open)
    reset(sock)
    wait_until(lambda: not target.open)
    connect(target.address)
    wait_until(lambda: target.open)


def test_peer_resets_before_a_long_answer_target_serves_the_next(start, connect):
    target = start(HttpTarget)
    sock = connect(target.address)
    sock.sendall(b"GET /bytes/100000000 HTTP/1.1\r\nHost: x\r\n\r\n")
    receive(sock, 1)
    reset(sock)
    wait_until(lambda: not target.open)


def test_port_in_use_raises_start_error(start):
    target = start(EchoTarget)
    with pytest.raises(StartError, match="Address already in use"):
        EchoTarget(target.address)


# --- echo


def test_echo_lines_come_back_however_they_are_cut(start, connect):
    sock = connect(start(EchoTarget).address)
    for byte in b"hello\n":
        sock.sendall(bytes([byte]))
    assert receive(sock, 6) == b"hello\n"
    assert ask(sock, b"a\n\nb\n") == b"a\n\nb\n"


def test_echo_half_a_line_is_not_answered(start, connect):
    sock = connect(start(EchoTarget).address)
    assert ask(sock, b"a\n") == b"a\n"
    sock.sendall(b"half")
    sock.shutdown(socket.SHUT_WR)
    assert is_closed(sock)


def test_delay_is_spent_on_each_message_of_a_connection(start, connect):
    target = start(EchoTarget, max_connections=2, delay=0.05)
    begin = time.monotonic()
    first, second = connect(target.address), connect(target.address)
    first.sendall(b"1\n2\n")
    assert ask(second, b"3\n") == b"3\n"
    of_second = time.monotonic() - begin
    receive(first, 4)
    of_first = time.monotonic() - begin
    assert of_second >= 0.05
    assert of_first >= 0.1


# --- ISO 8583


def frame(target_class, fields):
    message, _ = iso8583.encode(dict(fields), SPEC)
    return target_class.wrap(bytes(message))


def exchange(sock, target_class, fields):
    sock.sendall(frame(target_class, fields))
    return receive_message(sock, target_class)


def receive_message(sock, target_class):
    header = receive(sock, target_class.codec_class.header_size)
    length = int.from_bytes(header, "big") if target_class is Iso8583Target else int(header)
    fields, _ = iso8583.decode(receive(sock, length), SPEC)
    return {name: value for name, value in fields.items() if name not in ("h", "p", "1")}


both_headers = pytest.mark.parametrize("target_class", [Iso8583Target, MpuTarget])


@both_headers
def test_iso8583_echo_test_is_answered(start, connect, target_class):
    sock = connect(start(target_class).address)
    fields = {"t": "0800", "7": "1122140000", "11": "000007", "70": "301"}
    assert exchange(sock, target_class, fields) == {**fields, "t": "0810", "39": "00"}


@both_headers
def test_iso8583_purchase_is_approved_without_its_card_number(start, connect, target_class):
    sock = connect(start(target_class).address)
    repeated = {"3": "000000", "4": "000000001250", "11": "000001", "37": "0" * 12, "41": "TERM0001", "49": "978"}
    answer = exchange(sock, target_class, {"t": "0200", "2": CARD, **repeated})
    approval = answer.pop("38")
    assert answer == {"t": "0210", "39": "00", **repeated}
    assert len(approval) == 6
    assert exchange(sock, target_class, {"t": "0100", "11": "000002"})["38"] != approval


@pytest.mark.parametrize(
    ("asked", "answered"), [("0100", "0110"), ("0420", "0430"), ("0401", "0411"), ("1804", "1814")]
)
def test_iso8583_type_of_the_answer(start, connect, asked, answered):
    sock = connect(start(Iso8583Target).address)
    answer = exchange(sock, Iso8583Target, {"t": asked, "11": "000001"})
    assert answer["t"] == answered
    assert ("38" in answer) == (asked == "0100")


@both_headers
def test_iso8583_messages_come_cut_and_together_with_a_keepalive(start, connect, target_class):
    sock = connect(start(target_class).address)
    sent = frame(target_class, {"t": "0800", "11": "000001"}) + target_class.wrap(b"")
    sent += frame(target_class, {"t": "0800", "11": "000002"})
    for byte in sent[:30]:
        sock.sendall(bytes([byte]))
    sock.sendall(sent[30:])
    assert [receive_message(sock, target_class)["11"] for _ in range(2)] == ["000001", "000002"]


@pytest.mark.parametrize(
    ("target_class", "data", "reason"),
    [
        (Iso8583Target, b"\0\4spam", "not an ISO 8583 message"),
        (Iso8583Target, b"\0\x14" + b"\xff" * 20, "not an ISO 8583 message"),
        (Iso8583Target, b"\0\x140200F0" + b"0" * 14, "not an ISO 8583 message"),
        (MpuTarget, b"+020" + b"0" * 20, "not 4 ASCII digits"),
        (MpuTarget, b"00200890" + b"0" * 16, "asks for no answer"),
        (MpuTarget, b"0020abcd" + b"0" * 16, "asks for no answer"),
    ],
)
def test_iso8583_garbage_closes_the_connection_with_a_line(start, connect, target_class, data, reason):
    target = start(target_class)
    sock = connect(target.address)
    host, port = sock.getsockname()
    sock.sendall(data)
    assert is_closed(sock)
    wait_until(lambda: len(target.lines) > 1)
    assert target.lines[1].startswith(f"closed: {host}:{port}, ")
    assert reason in target.lines[1]
    assert exchange(connect(target.address), target_class, {"t": "0800"})["t"] == "0810"


def test_iso8583_answer_is_left_alone(start, connect):
    sock = connect(start(MpuTarget).address)
    sock.sendall(b"00200810" + b"0" * 16)
    assert exchange(sock, MpuTarget, {"t": "0800"})["t"] == "0810"


# --- HTTP


class Browser(HTTPConnection):
    """An HTTP client on one gevent socket, which never connects again."""

    auto_open = 0

    def __init__(self, sock):
        super().__init__("target")
        self.sock = sock

    def fetch(self, method, path, body=None, headers=None, chunked=False) -> tuple[HTTPResponse, bytes]:
        self.request(method, path, body, headers or {}, encode_chunked=chunked)
        response = self.getresponse()
        return response, response.read()


@pytest.fixture
def browse(start, connect):
    return lambda **options: Browser(connect(start(HttpTarget, **options).address))


def test_http_description_tells_the_request_and_counts(browse):
    browser = browse()
    for number in (1, 2):
        response, body = browser.fetch("PUT", "/a%20b?c=d", "h\u00e9llo".encode(), {"X-A": "1", "x-b": "2"})
        told = json.loads(body)
        assert response.getheader("Content-Type") == "application/json"
        assert (told["method"], told["path"]) == ("PUT", "/a%20b?c=d")
        assert told["headers"][-2:] == ["X-A: 1", "x-b: 2"]
        assert (told["body"]["length"], told["body"]["text"]) == (6, "h\u00e9llo")
        assert told["body"]["sha256"].startswith("3c48591d8d09")
        assert (told["connection"], told["request_on_connection"], told["request"]) == (1, number, number)


@pytest.mark.parametrize("body", [b"\xff\xfe", b"x" * 1025])
def test_http_description_shows_only_short_text(browse, body):
    _, answer = browse().fetch("POST", "/", body)
    assert json.loads(answer)["body"].keys() == {"length", "sha256"}


def test_http_chunked_upload_is_read_to_its_end(browse):
    browser = browse()
    chunked = {"Transfer-Encoding": "chunked"}
    _, body = browser.fetch("POST", "/", iter([b"spam", b"eggs"]), chunked, chunked=True)
    assert json.loads(body)["body"]["text"] == "spameggs"
    assert browser.fetch("POST", "/status/404", iter([b"x" * 99999]), chunked, chunked=True)[0].status == 404
    assert browser.fetch("GET", "/status/200")[0].status == 200


@pytest.mark.parametrize("size", [0, 1, 65536, 200_001])
def test_http_sizes_in_each_framing(browse, size):
    browser = browse()
    expected = b"".join(b"%07d\n" % (n % 8192) for n in range(size // 8 + 1))[:size]
    response, body = browser.fetch("GET", f"/bytes/{size}")
    assert (response.getheader("Content-Length"), body) == (str(size), expected)
    response, body = browser.fetch("GET", f"/chunked/{size}")
    assert (response.getheader("Transfer-Encoding"), body) == ("chunked", expected)
    response, body = browser.fetch("GET", f"/close/{size}")
    assert response.getheader("Content-Length") is response.getheader("Transfer-Encoding") is None
    assert (response.getheader("Connection"), body) == ("close", expected)


def test_http_numbered_lines_begin_anew_with_each_block():
    assert b"".join(numbered_lines(65544))[65520:] == b"0008190\n0008191\n0000000\n"


@pytest.mark.parametrize("path", ["/", "/bytes/50", "/chunked/50", "/close/50", "/status/404"])
def test_http_head_has_the_head_alone(start, connect, path):
    sock = connect(start(HttpTarget).address)
    sock.sendall(f"HEAD {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    while piece := sock.recv(4096):
        answer += piece
    assert answer.startswith(b"HTTP/1.1 ")
    assert answer.index(b"\r\n\r\n") == len(answer) - 4
    assert (b"Content-Length: 50\r\n" in answer) == (path == "/bytes/50")


def test_http_head_keeps_the_connection(browse):
    browser = browse()
    for path in ("/", "/chunked/50", "/bytes/50", "/"):
        assert browser.fetch("HEAD", path)[1] == b""
    assert json.loads(browser.fetch("GET", "/")[1])["request_on_connection"] == 5


def test_http_chunked_for_an_old_client_ends_by_closing(start, connect):
    sock = connect(start(HttpTarget).address)
    sock.sendall(b"GET /chunked/9 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    answer = b""
    while piece := sock.recv(4096):
        answer += piece
    assert answer.endswith(b"\r\n\r\n0000000\n0")


def test_http_echo_returns_body_and_type(browse):
    browser = browse()
    response, body = browser.fetch("POST", "/echo", b"\0\1" * 50_000, {"Content-Type": "a/b"})
    assert (response.getheader("Content-Type"), body) == ("a/b", b"\0\1" * 50_000)
    assert browser.fetch("POST", "/echo", b"x" * (16 * 1024 * 1024 + 1))[0].status == 413
    assert browser.fetch("GET", "/status/200")[0].status == 200


def test_http_status_is_as_asked(browse):
    browser = browse()
    for code in (200, 204, 299, 304, 404, 503):
        response, body = browser.fetch("GET", f"/status/{code}")
        assert response.status == code
        assert bool(body) == (code not in (204, 304))


def test_http_sleep_and_delay_take_their_time(browse):
    browser = browse(delay=0.03)
    begin = time.monotonic()
    assert browser.fetch("GET", "/sleep/40ms")[0].status == 200
    assert time.monotonic() - begin >= 0.07
    assert browser.fetch("GET", "/sleep/61")[0].status == 400
    assert browser.fetch("GET", "/sleep/1.2.3")[0].status == 400


def test_http_limit_holds_for_idle_connections(start, connect):
    target = start(HttpTarget)
    first = Browser(connect(target.address))
    first.fetch("GET", "/")
    second = connect(target.address)
    second.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert is_closed(second)
    assert target.refused == 1
    assert json.loads(first.fetch("GET", "/")[1])["request"] == 2


def test_http_upgrade_is_answered_as_any_request(browse):
    wish = {"Upgrade": "websocket", "Connection": "Upgrade"}
    assert browse().fetch("GET", "/", headers=wish)[0].status == 200


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        (b"spam\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"HTTP/1.1 400"),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 101 + b"\r\n", b"HTTP/1.1 400"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", b"HTTP/1.1 414"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nspam", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n;\r\n", b"HTTP/1.1 400"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\r\n\r\n", b""),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc", b""),
        (b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc", b""),
        (b"POST / HT", b"HTTP/1.1 400"),
    ],
)
def test_http_garbage_is_refused_or_closed_and_the_next_is_served(start, connect, data, answer):
    target = start(HttpTarget)
    sock = connect(target.address)
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)
    received = b""
    try:
        while piece := sock.recv(4096):
            received += piece
    except ConnectionResetError:
        pass
    assert received[: len(answer) or None] == answer
    assert Browser(connect(target.address)).fetch("GET", "/")[0].status == 200


# --- serve


@pytest.mark.parametrize("protocol", ["echo", "http", "iso8583", "mpu"])
def test_serve_listens_on_loopback_with_its_limit(connect, protocol):
    address = samples.serve(protocol, 2)
    assert address[0] == "127.0.0.1"
    held = [connect(address) for _ in range(2)]
    assert is_closed(connect(address))
    assert len(held) == 2


def test_serve_answers_in_its_protocol(connect):
    assert ask(connect(samples.serve("echo", 1)), b"x\n") == b"x\n"
    assert Browser(connect(samples.serve("http", 1))).fetch("GET", "/")[0].status == 200
    fields = {"t": "0800", "11": "000001"}
    for target_class in (Iso8583Target, MpuTarget):
        sock = connect(samples.serve(target_class.protocol, 1))
        assert exchange(sock, target_class, fields)["t"] == "0810"


def test_serve_protocol_without_sample_raises_config_error():
    with pytest.raises(ConfigError) as caught:
        samples.serve("modbus", 1)
    assert str(caught.value) == (
        "--target: 'embedded' is not allowed with --protocol modbus: only echo, http, iso8583, mpu have a sample target"
    )
