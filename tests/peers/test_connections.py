"""Who is connected to whom: the target sees one connection, a client keeps its own and gets its own answers."""

from __future__ import annotations

from itertools import takewhile

import pytest
from gevent import subprocess

from tests.peers.exchanges import AT_ONCE, CLIENTS, KEEPING, TARGETS, content, exchanges_of
from tests.peers.support import Got, url
from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.programs import program

each_target = pytest.mark.parametrize("target", TARGETS)
each_client = pytest.mark.parametrize("client", CLIENTS)
PIPELINED = 20


def told(answers: list[Got], name: str) -> set[int]:
    return {int(value) for answer in answers for field, value in answer["fields"] if field == name}


@each_target
@each_client
def test_target_sees_one_connection_at_a_time(target, client, asked):
    answers = asked(target, client)
    got = [*answers.through.values(), *answers.at_once]
    assert told(got, "X-Open") == (set() if target == "gunicorn" else {1})


@each_client
@pytest.mark.parametrize("target", KEEPING)
def test_target_that_keeps_connections_sees_the_same_one(target, client, asked):
    """Also of 20 clients at once that close theirs."""
    answers = asked(target, client)
    kept = takewhile(lambda exchange: target not in exchange.may_end, exchanges_of(target))
    assert len(told([answers.through[exchange.name] for exchange in kept], "X-Peer")) == 1
    assert len(told(answers.at_once, "X-Peer")) == 1


@each_target
@each_client
def test_client_keeps_one_connection_for_all_its_exchanges(target, client, asked):
    """Even where the target ends its own with each answer; of those asked at once each has one."""
    assert asked(target, client).connections == 1 + AT_ONCE


@each_target
@each_client
def test_clients_at_once_get_their_own_answers(target, client, asked):
    got = [(answer["status"], answer["text"]) for answer in asked(target, client).at_once]
    assert got == [(200, f"/token/{client}-{n}") for n in range(AT_ONCE)]


@each_target
@each_client
def test_nothing_of_it_is_worth_a_warning(target, client, asked):
    assert [line for line in asked(target, client).log if not line.startswith("INFO")] == []


@pytest.mark.parametrize("pair", TARGETS, indirect=True)
def test_client_that_pipelines_is_answered_in_order(pair):
    tokens = [b"/token/%d" % n for n in range(PIPELINED)]
    with Client(pair.server.address, HTTP) as client:
        client.send_raw(b"".join(b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % token for token in tokens))
        assert [client.receive() for _ in tokens] == tokens


@pytest.mark.parametrize("size", [10, 300_000])
@pytest.mark.parametrize("pair", ["http.server-1.0", "http.server-1.1"], indirect=True)
def test_post_in_chunks_arrives_at_a_target_that_knows_no_chunks(pair, size):
    words = ["-q", "-sS", "--noproxy", "*", "--max-time", "15", "-w", "%{http_code}", "-H", "Expect:"]
    chunks = ["-H", "Transfer-Encoding: chunked", "--data-binary", "@-", f"{url(pair.server.address)}/echo"]
    done = subprocess.run([program("curl"), *words, *chunks], input=content(size), capture_output=True)
    assert (done.returncode, done.stdout[-3:]) == (0, b"200"), done.stderr
    assert done.stdout[:-3] == content(size)
