"""What the probe asks, and how it judges answers: a state machine without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux.codecs import registry
from gmux.codecs._http_probe import LAST, ORDER, PADDING, Answer, is_of
from gmux.codecs.base import Limits, Part, Probe, Request

DEPTHS = range(2, 65)

#: How a target answers, by method and target of a request; None: it ends the connection.
Site = dict[bytes, Answer | None]

NEW, HEAD, ROOT, OPTIONS = b"GET /gmux-0a", b"HEAD /", b"GET /", b"OPTIONS *"
USUAL: Site = {NEW: Answer(404, 9), HEAD: Answer(200, 0), ROOT: Answer(200, 500), OPTIONS: Answer(200, 0)}


def probe_of(depth: int = 16) -> Probe:
    probe = registry.load("http")(Limits(), authority="a:80").make_probe(depth, "0a")
    assert probe is not None
    return probe


def line(request: Request) -> bytes:
    return request.data.split(b" HTTP/1.1\r\n")[0]


def deliver(probe: Probe, answer: Answer, pieces: int = 1, may_pipeline: bool = True) -> None:
    data = b"HTTP/1.1 %d X\r\nA: b\r\n\r\n" % answer.status
    probe.receive(Part(b"", last=False), True)  # an interim answer that is dropped
    if pieces == 1:
        probe.receive(Part(data + b"." * answer.length), may_pipeline)
        return
    probe.receive(Part(data, last=False), may_pipeline)
    for at in range(answer.length):
        probe.receive(Part(b".", last=at == answer.length - 1), may_pipeline)
    if not answer.length:
        probe.receive(Part(b""), may_pipeline)


def alone(probe: Probe, site: Site, pieces: int = 1) -> list[Request]:
    """Answer what is asked alone; what is then sent together, or nothing."""
    while True:
        requests = probe.requests()
        if len(requests) != 1:
            return requests
        answer = site[line(requests[0])]
        if answer is None:
            probe.fail("closed")
            if probe.objection:
                return []
        else:
            deliver(probe, answer, pieces)


def run(probe: Probe, site: Site, spoil=lambda answers: answers) -> str:
    """The verdict on a target that answers as `site` says, and what comes together as `spoil` changes it."""
    requests = alone(probe, site)
    while requests:
        together = [site[line(request)] for request in requests]
        answers = spoil(together) if len(requests) > 1 else together
        for answer in answers[: len(requests)]:
            deliver(probe, answer)
        if len(answers) < len(requests):
            probe.fail("silence")
        elif len(answers) > len(requests):
            probe.fail("bytes came that nobody asked for")
        if probe.objection:
            return probe.objection
        requests = probe.requests()
    return probe.objection


def test_order_shows_each_loss_turn_and_shift_at_all_depths():
    for depth in DEPTHS:
        steps = [ORDER[at : at + depth] for at in range(0, len(ORDER), depth)]
        whole = [step for step in steps if len(step) == min(depth, len(ORDER))]
        assert sum(step == step[::-1] for step in whole) <= {2: 3, 4: 1}.get(depth, 0)
    for distance in range(1, len(ORDER) // 2):
        assert ORDER[distance:] != ORDER[:-distance]
        assert ORDER[distance:] + ORDER[:distance] != ORDER
    assert ORDER[-1] != LAST
    assert set(ORDER[-4:]) == {0, 1}


@pytest.mark.parametrize("depth", DEPTHS)
def test_target_that_answers_all_has_no_objection_against_it(depth):
    probe = probe_of(depth)
    assert run(probe, USUAL) == ""
    assert probe.requests() == []


def test_what_is_sent_together_is_both_kinds_in_different_lengths_of_a_few_kilobytes():
    requests = alone(probe_of(), USUAL)
    assert [line(request) for request in requests] == [(NEW, HEAD)[kind] for kind in ORDER]
    assert len({len(request.data) for request in requests}) == len(PADDING)
    assert 4096 < sum(len(request.data) for request in requests) < 16384
    assert all(request.whole and not request.repeatable and not request.close for request in requests)
    assert all(b"\r\nHost: a:80\r\n" in request.data for request in requests)


@pytest.mark.parametrize("depth", [2, 3, 16, 17, 40, 64, 1000])
def test_no_more_requests_go_together_than_may_be_in_flight(depth):
    probe = probe_of(depth)
    requests = alone(probe, USUAL)
    sizes = []
    while requests:
        sizes.append(len(requests))
        for request in requests:
            deliver(probe, USUAL[line(request)])
        requests = probe.requests()
    assert max(sizes) == min(depth, 64)
    assert sum(sizes) == max(16, min(depth, 64)) + 1
    assert sizes[-1] == 1


@pytest.mark.parametrize(
    ("site", "pair"),
    [
        (USUAL, {NEW, HEAD}),
        (USUAL | {HEAD: None}, {NEW, ROOT}),
        (USUAL | {NEW: None}, {HEAD, ROOT}),
        (USUAL | {NEW: None, HEAD: None}, {ROOT, OPTIONS}),
        (USUAL | {NEW: Answer(200, 0)}, {NEW, ROOT}),
        (dict.fromkeys(USUAL, Answer(200, 0)) | {OPTIONS: Answer(405, 0)}, {NEW, OPTIONS}),
    ],
)
def test_first_two_that_can_be_told_apart_are_sent_together(site, pair):
    assert {line(request) for request in alone(probe_of(), site)} == pair


@pytest.mark.parametrize(
    ("site", "why"),
    [
        (dict.fromkeys(USUAL, Answer(200, 2)), "cannot be told apart"),
        (dict.fromkeys(USUAL), "ends its connection"),
        (dict.fromkeys(USUAL) | {ROOT: Answer(200, 2)}, "ends its connection"),
        (dict.fromkeys(USUAL) | {OPTIONS: Answer(200, 2)}, "ends its connection"),
    ],
)
def test_target_without_two_such_answers_is_refused(site, why):
    assert why in run(probe_of(), site)


def test_answer_after_which_the_connection_ends_is_none():
    """Such as the answer to HEAD with a body, which is bytes that nobody asked for."""
    probe = probe_of()
    for name in (NEW, HEAD):
        (request,) = probe.requests()
        deliver(probe, USUAL[name])
        assert line(request) == name
    probe.fail("2 bytes came that nobody asked for")
    (request,) = probe.requests()
    assert line(request) == ROOT


def test_connection_that_takes_one_request_at_a_time_is_refused_at_once():
    probe = probe_of()
    probe.requests()
    deliver(probe, Answer(404, 9), may_pipeline=False)
    assert probe.requests() == []
    assert "HTTP/1.0" in probe.objection


def test_objection_says_how_many_answers_came_and_why_no_more():
    assert run(probe_of(), USUAL, lambda answers: answers[:3]).endswith("(3 of 16 answers came: silence)")


def test_answer_left_over_is_seen_by_the_request_that_comes_after():
    probe = probe_of()
    for request in alone(probe, USUAL):
        deliver(probe, USUAL[line(request)])
    (request,) = probe.requests()
    assert line(request) == (NEW, HEAD)[LAST]
    deliver(probe, USUAL[(NEW, HEAD)[ORDER[-1]]])
    assert probe.requests() == []
    assert "the next answer was that to another request" in probe.objection


def test_answers_in_pieces_are_judged_as_whole_ones():
    probe = probe_of()
    requests = alone(probe, USUAL, pieces=2)
    while requests:
        for request in requests:
            deliver(probe, USUAL[line(request)], pieces=2)
        requests = probe.requests()
    assert probe.objection == ""


ANSWERS = st.builds(Answer, st.sampled_from([200, 301, 404, 405]), st.integers(0, 300))


@given(ANSWERS, ANSWERS, ANSWERS)
def test_no_answer_is_of_both_kinds(one, own, other):
    assert not (own != other and is_of(one, own, other) and is_of(one, other, own))
    assert own == other or (is_of(own, own, other) and not is_of(other, own, other))


@given(st.fixed_dictionaries(dict.fromkeys(USUAL, ANSWERS)), st.integers(2, 40))
def test_target_whose_answers_differ_is_granted_what_it_does(site, depth):
    assert (run(probe_of(depth), site) == "") == (len(set(site.values())) > 1)


@given(st.data(), st.integers(2, 40))
def test_answers_that_are_not_those_to_the_requests_are_refused(data, depth):
    """Whatever is lost, doubled, turned or made up, once or each time."""
    was_spoilt = False

    def spoil(right):
        nonlocal was_spoilt
        size = data.draw(st.integers(0, len(right) + 2))
        answers = data.draw(st.lists(st.sampled_from(right), min_size=size, max_size=size))
        was_spoilt = was_spoilt or answers != right
        return answers

    assert bool(run(probe_of(depth), USUAL, spoil)) == was_spoilt
