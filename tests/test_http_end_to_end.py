"""HTTP from end to end: curl and other real clients, gmux with one upstream connection, a target that counts."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection

import gevent
import pytest
from gevent import subprocess
from gevent.lock import Semaphore

from gmux.samples.http import HttpTarget, numbered_lines
from tests.invariants.conftest import _guarded as _guarded
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.programs import program
from tests.support.service import Server, serving
from tests.support.target import Target, answer, close, closed_port, hold, in_turn, never, reset, send
from tests.support.wait import PATIENCE, wait_until

MEGABYTE = 1 << 20

#: curl's exit codes for an answer that is not complete: fewer bytes than said, and a connection that was reset.
CURL_CUT = (18, 56)


@contextmanager
def sample() -> Iterator[HttpTarget]:
    """The sample target, which takes one connection and refuses more."""
    target = HttpTarget(("127.0.0.1", 0))
    target.start()
    try:
        yield target
    finally:
        target.stop()


@contextmanager
def served(**settings: str) -> Iterator[tuple[str, HttpTarget]]:
    """The URL of gmux before the sample target. At the end the target must have seen one connection, and no other."""
    with sample() as target:
        with serving(target.address, protocol="http", **settings) as service:
            yield url(service), target
        assert (target.served, target.refused) == (1, 0)


def url(service) -> str:
    return "http://{}:{}".format(*service.address)


def curl(*words: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run curl in a process of its own and wait for it in the loop."""
    fixed = ["-q", "--silent", "--show-error", "--noproxy", "*", "--max-time", "50"]
    return subprocess.run([program("curl"), *fixed, *words], input=stdin, capture_output=True)


def fetch(*words: str, stdin: bytes = b"") -> bytes:
    """What curl prints; it must be content."""
    done = curl(*words, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def numbered(size: int) -> bytes:
    return b"".join(numbered_lines(size))


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def head_of(client: Client) -> tuple[bytes, dict[bytes, bytes]]:
    """The status line and the fields of the next answer."""
    status, *lines = client.until(b"\r\n\r\n")[:-4].split(b"\r\n")
    return status, {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}


def request(path: bytes, *fields: bytes, method: bytes = b"GET", body: bytes = b"") -> bytes:
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: a", *fields, b"", body])


def post(path: bytes, body: bytes = b"x") -> bytes:
    return request(path, b"Content-Length: %d" % len(body), method=b"POST", body=body)


# curl


def test_curl_get_is_answered_by_the_target():
    with served() as (where, _):
        told = json.loads(fetch("-H", "X-Own: 1", f"{where}/a?b=c"))
    assert (told["method"], told["path"]) == ("GET", "/a?b=c")
    assert "X-Own: 1" in told["headers"]
    assert f"Host: {where[7:]}" in told["headers"]


def test_curl_post_of_json_arrives_whole():
    text = json.dumps({"pan": "x" * 500, "n": list(range(50))})
    with served() as (where, _):
        told = json.loads(fetch("-H", "Content-Type: application/json", "-d", text, f"{where}/json"))
    assert (told["method"], told["body"]["length"], told["body"]["sha256"]) == (
        "POST",
        len(text),
        sha256(text.encode()),
    )
    assert "Content-Type: application/json" in told["headers"]


def test_curl_post_of_a_form_with_a_file_arrives_byte_for_byte(tmp_path):
    data = noise(5 * MEGABYTE)
    (tmp_path / "file").write_bytes(data)
    with served() as (where, _):
        echoed = fetch("-F", f"file=@{tmp_path}/file", "-F", "name=value", f"{where}/echo")
    boundary, _, rest = echoed.partition(b"\r\n")
    assert rest.endswith(boundary + b"--\r\n")
    assert data in rest


def test_curl_upload_of_unknown_length_arrives_byte_for_byte():
    data = noise(3 * MEGABYTE + 1)
    with served() as (where, _):
        told = json.loads(fetch("-T", "-", f"{where}/up", stdin=data))
    assert told["method"] == "PUT"
    assert f"Content-Length: {len(data)}" in told["headers"], "a target that knows no chunks gets none"
    assert told["body"] == {"length": len(data), "sha256": sha256(data)}


def test_curl_expecting_100_is_told_to_continue_by_gmux_alone(tmp_path):
    """curl would wait for longer than it is allowed to in all, so a test that passes was told."""
    data = noise(2 * MEGABYTE)
    (tmp_path / "file").write_bytes(data)
    with served() as (where, _):
        done = curl("-v", "--expect100-timeout", "60", "--data-binary", f"@{tmp_path}/file", f"{where}/x")
    assert done.returncode == 0
    assert b"> Expect: 100-continue" in done.stderr
    assert done.stderr.count(b"< HTTP/1.1 100 Continue") == 1
    told = json.loads(done.stdout)
    assert told["body"]["sha256"] == sha256(data)
    assert not [line for line in told["headers"] if line.lower().startswith("expect:")]


@pytest.mark.parametrize("words", [["-T", "-"], ["-T", "-", "-H", "Expect:"], ["--data-binary", "@-", "-H", "Expect:"]])
def test_curl_upload_above_the_limit_gets_413_and_not_a_reset(words):
    """RFC 9112 section 9.6: what curl has still to send must not destroy the answer."""
    with served(max_message="100k") as (where, target):
        done = curl("-w", "%{http_code}", *words, f"{where}/up", stdin=noise(MEGABYTE))
        assert (done.returncode, done.stdout[-3:]) == (0, b"413"), done.stderr
        assert target.requests == 0
        assert fetch(f"{where}/bytes/5") == numbered(5)


def test_curl_head_has_the_length_and_no_body():
    """The next request goes on the same connections, which a body would have put out of step."""
    with served() as (where, target):
        out = fetch("-I", f"{where}/bytes/100000", "--next", "-sS", f"{where}/bytes/10")
        assert target.requests == 2
    head, _, rest = out.partition(b"\r\n\r\n")
    assert b"Content-Length: 100000" in head
    assert rest == numbered(10)


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
@pytest.mark.parametrize("framing", ["bytes", "chunked", "close"])
def test_curl_download_comes_byte_for_byte(framing, version):
    size = 3 * MEGABYTE + 7
    with sample() as target, serving(target.address, protocol="http") as service:
        assert sha256(fetch(version, f"{url(service)}/{framing}/{size}")) == sha256(numbered(size))
        # An answer that ends with the connection costs the target's; the next one comes on another.
        assert fetch(version, f"{url(service)}/{framing}/9") == numbered(9)
        assert target.refused == 0
        assert target.served == 1 if framing != "close" else target.served in (2, 3)


def test_curl_status_without_content_leaves_the_connection_in_step():
    with served() as (where, _):
        words = [word for code in (204, 304, 404, 200) for word in (f"{where}/status/{code}", "-w", "%{http_code},")]
        assert fetch(*words) == b"204,304,404 Not Found\n404,200 OK\n200,"


def test_curls_200_in_parallel_share_one_connection(tmp_path):
    """The real service. Each asks for a size of its own, so an answer of another would show."""
    program("curl")  # a greenlet cannot skip the test
    with Server(Target(framing=HTTP), target="embedded", pool_size="1") as server:
        where = "http://{}:{}".format(*server.address)
        files = ["-o", f"{tmp_path}/#1", f"{where}/bytes/[20000-20199]"]
        single = [gevent.spawn(fetch, f"{where}/chunked/{300_000 + n}") for n in range(5)]
        fetch("--parallel", "--parallel-immediate", "--parallel-max", "200", *files)
        for n, done in enumerate(single):
            assert done.get() == numbered(300_000 + n)
        told = json.loads(fetch(where))
        assert (told["connection"], told["request"], told["request_on_connection"]) == (1, 206, 206)
        assert not server.said("refused")
        # curl may use a connection again that is free early; most must have been there at once.
        wait_until(lambda: server.said("#150: "), what="150 clients")
    for size in range(20000, 20200):
        assert (tmp_path / str(size)).read_bytes() == numbered(size), f"not the answer to /bytes/{size}"


# Other clients


def test_client_keeping_its_connection_gets_each_answer():
    """The standard library's client, in a thread, because it blocks."""

    def use(address):
        connection = HTTPConnection(*address, timeout=PATIENCE)
        for n in range(1, 20):
            for method, path, size in (
                ("GET", f"/bytes/{n}", n),
                ("HEAD", f"/bytes/{n}", 0),
                ("GET", f"/chunked/{n}", n),
                ("GET", "/status/204", 0),
            ):
                connection.request(method, path)
                assert connection.getresponse().read() == numbered(size)
            connection.request("POST", "/echo", body=b"y" * n)
            assert connection.getresponse().read() == b"y" * n
        connection.close()

    with sample() as target, serving(target.address, protocol="http") as service:
        gevent.get_hub().threadpool.apply(use, (service.address,))
        assert (target.served, target.refused, target.requests) == (1, 0, 95)


def test_client_pipelining_in_one_packet_is_answered_in_order():
    """The first is slow and not idempotent; the third comes in two pieces."""
    gate = Semaphore(0)
    with Target(in_turn((hold(gate), answer)), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(post(b"/1") + request(b"/2") + request(b"/3")[:-1])
            wait_until(lambda: target.requests == [b"1"])
            gate.release()
            assert [client.receive(), client.receive()] == [b"1", b"2"]
            assert target.requests == [b"1", b"2"]
            client.send_raw(b"\n")
            assert client.receive() == b"3"
        assert target.accepted == 1


def test_client_closing_after_its_answer_ends_alone():
    with Target(framing=HTTP) as target, serving(target) as service:
        for n in range(3):
            with Client(service.address, HTTP) as client:
                client.send_raw(request(b"/%d" % n, b"Connection: close") + request(b"/behind"))
                status, fields = head_of(client)
                assert (status, fields[b"connection"]) == (b"HTTP/1.1 200 OK", b"close")
                assert client.exactly(1) == b"%d" % n
                client.receive_end()
        assert target.requests == [b"0", b"1", b"2"]
        assert target.accepted == 1


def test_clients_of_http_1_0_share_the_connection_too():
    with Target(framing=HTTP) as target, serving(target) as service:
        for n in range(3):
            with Client(service.address, HTTP) as client:
                client.send_raw(b"GET /%d HTTP/1.0\r\n\r\n" % n)
                assert head_of(client)[1][b"connection"] == b"close"
                assert client.exactly(1) == b"%d" % n
                client.receive_end()
        assert target.accepted == 1


# Refusals


REFUSALS = {
    "400 smuggled": (post(b"/").replace(b"Host", b"Transfer-Encoding: chunked\r\nHost"), b"400 Bad Request"),
    "400 not HTTP": (b"hello\r\n\r\n", b"400 Bad Request"),
    "400 no version": (b"GET / \r\n\r\n", b"400 Bad Request"),
    "413 length": (request(b"/", b"Content-Length: 1001", method=b"PUT"), b"413 Content Too Large"),
    "413 chunks": (request(b"/", b"Transfer-Encoding: chunked", body=b"3e9\r\n"), b"413 Content Too Large"),
    "414": (request(b"/" + b"a" * 9000), b"414 URI Too Long"),
    "414 without end": (request(b"/" + b"a" * 40_000)[:35_000], b"414 URI Too Long"),
    "431 size": (request(b"/", b"X: " + b"x" * 33_000), b"431 Request Header Fields Too Large"),
    "431 number": (request(b"/", *[b"X: y"] * 100), b"431 Request Header Fields Too Large"),
    "501 coding": (request(b"/", b"Transfer-Encoding: gzip, chunked"), b"501 Not Implemented"),
    "501 CONNECT": (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", b"501 Not Implemented"),
    "505": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", b"505 HTTP Version Not Supported"),
}


def assert_refused(client: Client, status: bytes, is_closed: bool = True) -> dict[bytes, bytes]:
    """Fail unless the next answer is gmux's own, with that status; the fields of it."""
    line, fields = head_of(client)
    assert line == b"HTTP/1.1 " + status
    assert client.exactly(int(fields[b"content-length"])).startswith(b"gmux: ")
    assert (fields.get(b"connection") == b"close") is is_closed
    if is_closed:
        client.receive_end()
    return fields


@pytest.mark.parametrize(("raw", "status"), REFUSALS.values(), ids=REFUSALS)
def test_client_refused_is_told_and_closed_and_the_target_hears_nothing(raw, status):
    with Target(framing=HTTP) as target, serving(target, max_message="1000") as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/before") + raw + request(b"/behind"))
            assert client.receive() == b"before"
            assert_refused(client, status)
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/after"))
            assert client.receive() == b"after"
        assert target.requests == [b"before", b"after"]
        assert target.accepted == 1


@pytest.mark.parametrize("raw", [request(b"/")[:-1], post(b"/", b"xx")[:-1]], ids=["head", "body"])
def test_client_too_slow_with_its_request_gets_408(raw):
    with Target(framing=HTTP) as target, serving(target, request_timeout="40ms") as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(raw)
            assert_refused(client, b"408 Request Timeout")
        assert target.requests == []


def test_curl_without_a_target_gets_502():
    with serving(closed_port(), protocol="http") as service:
        out = fetch("-i", url(service))
    assert out.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")


@pytest.mark.parametrize(
    "steps",
    [(close,), (reset,), (send(b"HTTP/1.1 200 OK\r\nContent-"), close), (send(b"hello\r\n\r\n"),)],
    ids=["close", "reset", "half a head", "not HTTP"],
)
def test_client_whose_target_ends_before_a_head_gets_502_and_goes_on(steps):
    with Target(in_turn((answer,), steps), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            for path in (b"/1", b"/2", b"/3"):
                client.send_raw(post(path))
                if path == b"/2":
                    assert_refused(client, b"502 Bad Gateway", is_closed=False)
                else:
                    assert client.receive() == path[1:]
        assert target.requests == [b"1", b"2", b"3"]


def test_client_too_many_in_the_queue_gets_503():
    gate = Semaphore(0)
    with Target((hold(gate), answer), HTTP) as target, serving(target, queue_limit="1") as service:
        service.wait_ready()
        with (
            Client(service.address, HTTP) as first,
            Client(service.address, HTTP) as second,
            Client(service.address, HTTP) as third,
        ):
            first.send_raw(request(b"/1"))
            wait_until(lambda: target.requests)
            second.send_raw(request(b"/2"))
            wait_until(lambda: service.waiting == 1)
            third.send_raw(request(b"/3"))
            assert int(assert_refused(third, b"503 Service Unavailable", is_closed=False)[b"retry-after"]) > 0
            gate.release()
            gate.release()
            assert (first.receive(), second.receive()) == (b"1", b"2")
        assert target.requests == [b"1", b"2"]


def test_client_too_long_in_the_queue_gets_503():
    gate = Semaphore(0)
    with Target((hold(gate), answer), HTTP) as target, serving(target, queue_timeout="40ms") as service:
        service.wait_ready()
        with Client(service.address, HTTP) as first, Client(service.address, HTTP) as second:
            first.send_raw(request(b"/1"))
            wait_until(lambda: target.requests)
            second.send_raw(request(b"/2"))
            assert int(assert_refused(second, b"503 Service Unavailable", is_closed=False)[b"retry-after"]) > 0
            gate.release()
            assert first.receive() == b"1"
        assert target.requests == [b"1"]


def test_client_above_max_clients_gets_503_and_is_closed():
    with Target(framing=HTTP) as target, serving(target, max_clients="1") as service:
        first, second = Client(service.address, HTTP), Client(service.address, HTTP)
        with first, second:
            assert b"retry-after" in assert_refused(second, b"503 Service Unavailable")
            first.send_raw(request(b"/1"))
            assert first.receive() == b"1"


def test_client_of_a_silent_target_gets_504():
    # Long enough for the second to be answered, however busy the machine.
    with Target(in_turn(never), HTTP) as target, serving(target, timeout="500ms") as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/1"))
            assert_refused(client, b"504 Gateway Timeout", is_closed=False)
            client.send_raw(request(b"/2"))
            assert client.receive() == b"2"
        assert (target.requests, target.accepted) == ([b"1", b"2"], 2)


# What must not happen


BEGUN = {
    "length": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    "chunked": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "until close": b"HTTP/1.1 200 OK\r\n\r\nhalf",
}
ENDS = {"close": close, "reset": reset, "garbage": send(b"\r\n\0\r\n")}
#: Without those that are answers: a close ends what it frames, and any bytes are a body.
CUTS = [
    ("length", "close"),
    ("length", "reset"),
    ("chunked", "close"),
    ("chunked", "reset"),
    ("chunked", "garbage"),
    ("until close", "reset"),
]


@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
@pytest.mark.parametrize(("begun", "end"), CUTS)
def test_curl_of_an_answer_cut_off_does_not_take_it_for_whole(begun, end, version):
    program("curl")  # a greenlet cannot skip the test
    gate = Semaphore(0)
    steps = (send(BEGUN[begun]), hold(gate), ENDS[end])
    with Target(in_turn(steps), HTTP) as target, serving(target) as service:
        done = gevent.spawn(curl, version, url(service))
        # The target ends only when gmux has what it sent: a reset may destroy what was not read.
        wait_until(lambda: any(up.exchange and up.exchange.answered for up in service.pool._upstreams))
        gate.release()
        assert done.get().returncode in CURL_CUT
        assert fetch(url(service) + "/next") == b"next"
        assert target.accepted == 2


def test_client_slow_with_a_large_answer_keeps_nobody_waiting():
    size = 50 * 1000 * 1000
    with served() as (where, target):
        address = (where[7:].partition(":")[0], int(where.rpartition(":")[2]))
        with Client(address, HTTP, receive_buffer=4096) as slow:
            slow.send_raw(request(b"/bytes/%d" % size))
            head_of(slow)
            assert fetch(f"{where}/bytes/100") == numbered(100)
            assert target.requests == 2
            digest, left = hashlib.sha256(), size
            while left:
                data = slow.exactly(min(left, MEGABYTE))
                digest.update(data)
                left -= len(data)
    expected = hashlib.sha256()
    for block in numbered_lines(size):
        expected.update(block)
    assert digest.digest() == expected.digest()


@pytest.mark.parametrize("end", [close, reset], ids=["close", "reset"])
@pytest.mark.parametrize(("method", "times"), [(b"GET", 2), (b"HEAD", 2), (b"PUT", 2), (b"DELETE", 2), (b"POST", 1)])
def test_request_on_a_reused_connection_that_ends_is_repeated_if_idempotent(method, times, end):
    """RFC 9110 section 9.2.2: the target may have read it before it closed."""
    with Target(in_turn((answer,), (end,)), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/first"))
            assert client.receive() == b"first"
            client.send_raw(request(b"/second", b"Content-Length: 0", method=method))
            status, _ = head_of(client)
        assert status == (b"HTTP/1.1 200 OK" if times == 2 else b"HTTP/1.1 502 Bad Gateway")
        assert target.times() == {b"first": 1, b"second": times}


def test_request_idempotent_is_repeated_once_and_no_more():
    with Target(in_turn((answer,), (close,), (close,)), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/first"))
            assert client.receive() == b"first"
            client.send_raw(request(b"/second"))
            assert_refused(client, b"502 Bad Gateway", is_closed=False)
        assert target.times() == {b"first": 1, b"second": 2}


def test_request_idempotent_is_not_repeated_when_its_answer_has_begun():
    with Target(in_turn((answer,), (send(b"HTTP/1.1 2"), close)), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as client:
            client.send_raw(request(b"/first"))
            assert client.receive() == b"first"
            client.send_raw(request(b"/second"))
            assert_refused(client, b"502 Bad Gateway", is_closed=False)
        assert target.times() == {b"first": 1, b"second": 1}


def test_answer_of_204_with_a_late_body_is_nobodys_answer():
    """The body is a whole answer; were the connection kept, the next client would get it."""
    lie = b"HTTP/1.1 204 No Content\r\nContent-Length: %d\r\n\r\n"
    body = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil"
    gate = Semaphore(0)
    steps = (send(lie % len(body)), hold(gate), send(body))
    with Target(in_turn(steps), HTTP) as target, serving(target) as service:
        with Client(service.address, HTTP) as first, Client(service.address, HTTP) as second:
            first.send_raw(request(b"/1"))
            assert head_of(first)[0] == b"HTTP/1.1 204 No Content"
            second.send_raw(request(b"/2"))
            # It waits for a new connection; on the old one it would get what comes now.
            wait_until(lambda: service.waiting or any(up.exchange for up in service.pool._upstreams))
            gate.release()
            assert second.receive() == b"2"
        assert target.accepted == 2
