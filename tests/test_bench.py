"""The benchmark: its driver as `make bench` runs it, its load generator, and HAProxy and wrk where they are."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest import bench, haproxy, load, wrk
from loadtest.bench import DIRECT, HAPROXY, PIPELINED, STRICT, Case, Settings
from loadtest.load import Load
from loadtest.processes import ProcessFailed
from loadtest.protocols import PROTOCOLS
from tests.support.programs import program
from tests.support.threaded import target

ROOT = Path(__file__).parents[1]

each_protocol = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=lambda protocol: protocol.name)


def settings(tmp_path, protocol="http", seconds=1) -> Settings:
    return Settings(PROTOCOLS[protocol], 0.0, [2], 1, 32, seconds, 1, tmp_path)


def test_driver_tells_each_proxy_and_what_is_left_out(tmp_path):
    words = [sys.executable, "-m", "loadtest.bench", "--proto=iso8583", "--clients=2", "--seconds=1", "--rounds=1"]
    done = subprocess.run([*words, f"--out={tmp_path}"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "HAProxy is left out: with iso8583 it cannot share a connection\n" in done.stdout
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("      2  ")]
    found = {" ".join(words[1:-7]): words[-7:] for words in lines if "/" not in words}
    assert list(found) == [DIRECT, STRICT, PIPELINED]
    for name, (rate, p50, p99, cpu, peak, *failed) in found.items():
        assert float(rate) > 0 and float(p50) <= float(p99)
        assert cpu == "-" if name == DIRECT else float(cpu) > 0
        assert (peak, failed) == ("2" if name == DIRECT else "1", ["0", "0"])


@pytest.mark.parametrize("word", ["--clients=0", "--clients=1,401", "--rounds=x", "--proto=modbus", "--pipeline=1"])
def test_wrong_argument_is_one_line_and_exit_2(word):
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.bench", word], cwd=ROOT, capture_output=True, text=True, timeout=20
    )
    name, _, value = word.partition("=")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"bench.py: {name}: '{value}' is not allowed: ")
    assert done.stderr.count("\n") == 1


def case(rate, p50, wrong=0, errors=0, refused=0, peak=1) -> Case:
    return Case(Load(100, wrong, errors, rate, p50, 2 * p50), 10.0, peak, refused)


def test_table_has_medians_and_the_sums_of_what_went_wrong():
    cases = {(1, STRICT): [case(100, 10), case(300, 30, wrong=1, peak=2), case(200, 20, errors=2, refused=3)]}
    assert bench.table(cases)[1] == ("1", STRICT, "200", "20", "40", "10.0", "2", "1", "5")
    assert sum(one.failed for one in cases[1, STRICT]) == 6


def test_ratios_are_of_medians_of_what_has_run():
    cases = {(1, STRICT): [case(300, 10), case(100, 10), case(200, 10)], (1, HAPROXY): [case(100, 20)]}
    assert bench.ratios(cases)[1:] == [("1", f"{STRICT} / {HAPROXY}", "2.00", "0.50")]


def test_what_is_not_installed_is_named_with_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(haproxy, "command", lambda: None)
    monkeypatch.setattr(wrk, "is_installed", lambda: False)
    assert HAPROXY not in bench.proxies(settings(tmp_path))
    bench.generator(settings(tmp_path))
    said = capsys.readouterr().out
    assert "apt-get install haproxy" in said and "apt-get install wrk" in said


# The load generator.


@each_protocol
def test_load_counts_right_answers(protocol):
    with target(protocol, protocol.answer) as address:
        seen = load.run(protocol, address, 3, 1.0)
    assert (seen.wrong, seen.errors) == (0, 0)
    assert seen.requests > 10 and seen.rate > 10
    assert 0 < seen.p50 <= seen.p99 < 1e6


@each_protocol
def test_load_counts_answers_that_belong_to_another(protocol):
    other = protocol.answer(protocol.request(99, 99))
    with target(protocol, lambda request: other) as address:
        seen = load.run(protocol, address, 2, 0.2)
    assert seen.wrong and not seen.errors
    assert seen.requests == 0 and math.isnan(seen.p50)


def test_load_counts_closes_and_ends():
    with target(PROTOCOLS["echo"], lambda request: b"") as address:
        seen = load.run(PROTOCOLS["echo"], address, 2, 0.2)
    assert seen.errors and not seen.wrong and not seen.requests


def test_load_that_reaches_nobody_counts_errors():
    port = haproxy.free_port()
    assert load.run(PROTOCOLS["echo"], f"127.0.0.1:{port}", 2, 0.2).errors == 2


# HAProxy and wrk.


def test_haproxy_keeps_to_the_budget(tmp_path):
    program("haproxy")
    one = settings(tmp_path)
    start = bench.proxies(one)[HAPROXY]
    found = bench.measure(one, start, 4, lambda address, n, folder: load.run(one.protocol, address, n, 0.3))
    assert (found.failed, found.peak) == (0, 1)
    assert found.cpu > 0


def test_haproxy_that_does_not_start_is_one_error(tmp_path):
    program("haproxy")
    with (
        haproxy.HAProxyProcess("127.0.0.1:1", 1, "no-such-word", tmp_path / "log", tmp_path) as process,
        pytest.raises(ProcessFailed, match="haproxy did not start: "),
    ):
        process.address()


def test_wrk_counts_requests_and_refusals(tmp_path):
    program("wrk")
    protocol = PROTOCOLS["http"]
    with target(protocol, protocol.answer) as address:
        seen = wrk.run(address, 2, 1, tmp_path / "log", tmp_path)
    assert seen.requests > 10 and (seen.errors, seen.wrong) == (0, None)
    assert 0 < seen.p50 <= seen.p99
    refusal = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    with target(protocol, lambda request: refusal) as address:
        assert wrk.run(address, 2, 1, tmp_path / "log", tmp_path).errors > 10
