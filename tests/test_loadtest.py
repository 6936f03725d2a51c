"""The load test: its driver as `make loadtest` runs it, and what its users take for a failure."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest import run as driver
from loadtest.processes import GmuxProcess, ProcessFailed, TargetProcess
from loadtest.protocols import PROTOCOLS, BadAnswer
from loadtest.report import Run, rows
from tests.support.threaded import target

ROOT = Path(__file__).parents[1]

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)


@pytest.fixture(scope="module")
def locust():
    """The command; in CI its absence is a failure."""
    if importlib.util.find_spec("locust") is None:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end("locust is not installed: pip install 'gmux[loadtest]'")
    return [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--only-summary"]


#: Seconds for a program to end, on the busiest machine.
PATIENCE = 150

#: Seconds of a load. Long enough for the first answers where others have the processors most of the time.
SECONDS = 3


def run(words: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, **options)


def drive(*words: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "-m", "loadtest.run", *words])


def load(locust, tmp_path, protocol, host) -> tuple[int, dict]:
    """The exit code of a load of two users, and the figures of it."""
    figures = tmp_path / "figures.json"
    done = run(
        [*locust, "--proto", protocol.name, "--host", host, "-u2", "-r2", f"-t{SECONDS}", f"--figures={figures}"]
    )
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(figures.read_text())


# The driver.


@pytest.mark.timeout(PATIENCE + 30)
def test_driver_measures_each_step_of_each_variant(locust, tmp_path):
    done = drive("--users=1,2", f"--seconds={SECONDS}", "--warmup=0", f"--out={tmp_path}")
    assert (done.returncode, done.stderr) == (0, "")
    variants = ["direct", "strict", "pool of 4", "pipelined"]
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(row["users"], row["variant"]) for row in table] == [(n, name) for n in "12" for name in variants]
    for row in table:
        assert float(row["answered/s"]) > 0 and row["failures"] == "0"
        assert float(row["p50"]) <= float(row["p95"]) <= float(row["p99"])
        assert (row["added p50"] == "") == (row["variant"] == "direct")
    assert (tmp_path / "table.txt").read_text() in done.stdout
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "latency.svg").read_text()
    assert all((tmp_path / "locust" / f"strict-2{end}").exists() for end in (".html", "_stats.csv"))


def test_table_marks_what_is_saturated_and_what_failed():
    direct = Run(2, "direct", 20, 1.0, [1.0, 2.0])
    strict = Run(2, "strict", 20, 1.0, [3.0, 5.0], is_saturated=True, failures={"request: closed": 3})
    _, first, second = rows([direct, strict])
    assert first == ["2", "direct", "20", "2.0", "1.00", "2.00", "2.00", "-", "-", "-", "0", ""]
    assert second == ["2", "strict", "20", "2.0", "3.00", "5.00", "5.00", "2.00", "3.00", "3.00", "3", "saturated"]


def test_variant_is_saturated_when_its_places_in_flight_are_busy_all_the_time():
    words = {"--proto": "http", "--delay": "2ms", "--users": "1,100", "--rate": "10", "--pool-size": "1"}
    words |= {"--pipeline": "8", "--seconds": "1", "--warmup": "0", "--out": "x"}
    ways = driver.variants(driver.Settings.read(words))
    limits = {way.name: next(n for n in range(100_000) if way.is_saturated(n, 0.002)) for way in ways}
    assert limits == {"direct": 50_000, "strict": 500, "pool of 4": 2000, "pipelined": 4000}
    assert not any(way.is_saturated(100_000, 0.0) for way in ways)


def test_failure_is_printed_and_ends_the_driver_with_1(locust, tmp_path, monkeypatch, capsys):
    runs = [Run(1, "direct", 10, 1.0, [1.0]), Run(1, "strict", 10, 1.0, [2.0], failures={"request: closed": 3})]
    monkeypatch.setattr(driver, "run", lambda *args: (runs, driver.failures(runs, {"strict": 2})))
    monkeypatch.setattr(driver, "interrupt_on_terminate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", f"--out={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "FAILED: 1 users, strict: 3 x request: closed\nFAILED: strict: the target refused 2 connections\n" in printed


def test_table_without_an_answer_has_no_times():
    _, _, row = rows([Run(1, "direct", 10, 1.0, [1.0]), Run(1, "strict", 10, 1.0, [])])
    assert row[3:10] == ["0.0", "-", "-", "-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("--users=1,x", "--users: '1,x' is not allowed: numbers from 1 to 400 that go up, such as 1,10,50"),
        ("--users=2,1", "--users: '2,1' is not allowed: numbers from 1 to 400 that go up, such as 1,10,50"),
        ("--proto=mpu", "--proto: 'mpu' is not allowed: one of echo, http, iso8583"),
        ("--delay=1h", "--delay: '1h' is not allowed: a time such as 2ms or 0.5s, at most 10s"),
        ("--seconds=0", "--seconds: '0' is not allowed: a number from 1 to 60"),
        ("--x", "--x is unknown or given twice; see --help"),
    ],
)
def test_wrong_argument_is_one_line_and_exit_2(word, said):
    done = drive(word)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"run.py: {said}\n")


def test_missing_locust_is_one_line_that_tells_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(driver, "interrupt_on_terminate", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as ended:
        driver.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "run.py: locust is not installed: pip install 'gmux[loadtest]'\n"


# The users.


def test_what_is_not_its_own_answer_is_a_failure(locust, tmp_path):
    protocol = PROTOCOLS["http"]
    refusal = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nno\n"
    turns = itertools.cycle(["its own", "another's", "close", "refusal"])
    before = protocol.request(9, 9)

    def answer_to(request):
        nonlocal before
        before, other = request, before
        turn = next(turns)
        answers = {"its own": protocol.answer(request), "another's": protocol.answer(other), "refusal": refusal}
        return answers.get(turn, b"")

    with target(protocol, answer_to) as host:
        code, figures = load(locust, tmp_path, protocol, f"http://{host}/")
    assert code == 1
    assert figures["times"]
    assert set(figures["failures"]) == {
        "request: the answer to another request",
        "request: closed without an answer",
        "request: 503 Service Unavailable",
    }


def test_host_that_is_none_is_a_failure_that_names_it(locust, tmp_path):
    code, figures = load(locust, tmp_path, PROTOCOLS["echo"], "nowhere")
    assert code == 1
    said = "connect: --host: 'nowhere' is not allowed: HOST:PORT, tcp://HOST:PORT or http://HOST:PORT"
    assert list(figures["failures"]) == [said]


# The target.


@each_protocol
def test_target_serves_what_is_in_flight_together(tmp_path, protocol):
    delay, requests = 0.25, [protocol.request(1, n) for n in range(20)]
    with TargetProcess(protocol, delay, 1, tmp_path / "log", tmp_path) as process:
        host, _, port = process.address().partition(":")
        with socket.create_connection((host, int(port)), 10) as sock:
            began = time.monotonic()
            sock.sendall(b"".join(requests))
            buffer, answers = bytearray(), []
            while len(answers) < len(requests):
                buffer += sock.recv(65536)
                while answer := protocol.cut(buffer):
                    answers.append(answer)
            took = time.monotonic() - began
            with socket.create_connection((host, int(port)), 10) as second:
                assert second.recv(1) == b""
        expected = [protocol.answer(request) for request in requests]
        assert (answers == expected) is protocol.is_ordered
        assert sorted(answers) == sorted(expected)
        # One after another they would take twice as long, at least.
        assert delay / 2 < took < delay / 4 * len(requests)
        assert process.summary() == {"accepted": 1, "refused": 1, "peak": 1, "requests": 20}


def test_target_whose_port_is_taken_is_one_line_and_exit_1():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        done = run([sys.executable, "-m", "loadtest.target", f"--port={port}"])
    said = f"target.py: cannot listen on 127.0.0.1:{port}: Address already in use\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_process_that_does_not_start_is_told_with_its_last_words(tmp_path):
    with (
        GmuxProcess(PROTOCOLS["echo"], "127.0.0.1:1", ["--no-such-flag"], tmp_path / "log", tmp_path) as process,
        pytest.raises(ProcessFailed, match="gmux did not start: gmux: unknown option --no-such-flag"),
    ):
        process.address()


# The messages.


@each_protocol
def test_message_is_cut_whatever_the_reads(protocol):
    messages = [protocol.request(1, n) for n in range(3)] + [protocol.answer(protocol.request(2, 3))]
    buffer, found = bytearray(), []
    for byte in b"".join(messages):
        buffer.append(byte)
        if message := protocol.cut(buffer):
            found.append(message)
    assert (found, buffer) == (messages, b"")


@each_protocol
def test_each_request_has_its_own_answer_alone(protocol):
    requests = [protocol.request(user, number) for user in (1, 2) for number in (1, 2)]
    for request in requests:
        protocol.check(request, protocol.answer(request))
        for other in requests:
            if other is not request:
                with pytest.raises(BadAnswer, match="the answer to another request"):
                    protocol.check(request, protocol.answer(other))
