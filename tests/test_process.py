"""The master before it serves: which sockets go to which route, and how many clients the descriptors are enough for."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack

import pytest

from gmux import app, net
from gmux.config import Given, GivenRoute, RouteConfig, ServiceConfig, read
from gmux.descriptors import Descriptors
from gmux.errors import ConfigErrors, StartError
from gmux.listener import max_lingering
from gmux.listening import Held, Listening
from gmux.logs import LOGGER
from gmux.master import Master
from tests.support.target import closed_port


def configure(**routes: dict[str, str]) -> ServiceConfig:
    given = [
        GivenRoute({name: Given(text, name) for name, text in texts.items()}, name) for name, texts in routes.items()
    ]
    return read({}, given)


def routes(**listen: str) -> tuple[RouteConfig, ...]:
    return configure(**{name: {"listen": address} for name, address in listen.items()}).routes


@pytest.fixture
def listening():
    sockets = Listening()
    yield sockets
    sockets.close(is_last=True)


def ports(held: list[Held]) -> list[int]:
    return [each.sock.getsockname()[1] for each in held]


# Sockets.


def test_sockets_of_unchanged_addresses_stay_whatever_the_order_of_routes(listening):
    port = closed_port()[1]
    first = listening.fit(routes(one="127.0.0.1:0", two=f"127.0.0.1:{port}"))
    listening.use(first)
    second = listening.fit(routes(three=f"127.0.0.1:{port}", four="127.0.0.1:0", five="127.0.0.1:0"))
    assert second[:2] == [first[1], first[0]]
    listening.use(second)
    assert len(set(ports(second))) == 3


def test_sockets_that_cannot_all_be_opened_nothing_changes(listening):
    listening.use(listening.fit(routes(one="127.0.0.1:0")))
    before = listening.sockets
    new = net.format_address(closed_port())
    with ExitStack() as stack:
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        with pytest.raises(StartError, match="Address already in use"):
            listening.fit(routes(one="127.0.0.1:0", two=new, three=net.format_address(taken.getsockname())))
    assert listening.sockets == before
    # What was opened on the way is closed.
    listening.use(listening.fit(routes(two=new)))


def test_sockets_that_are_not_used_after_all_are_closed(listening):
    listening.use(listening.fit(routes(one="127.0.0.1:0")))
    new = net.format_address(closed_port())
    fitting = listening.fit(routes(one="127.0.0.1:0", two=new))
    listening.give_up(fitting)
    assert fitting[1].sock.fileno() == -1
    assert listening.sockets == [fitting[0].sock]


# Descriptors.


@pytest.mark.parametrize(
    ("limit", "wanted", "taken"),
    [
        (4096, {"small": 50, "large": 10_000}, {"small": 50, "large": 3192}),
        (4096, {"one": 100, "two": 200}, {"one": 100, "two": 200}),
        (64, {"one": 10_000, "two": 10_000}, {"one": 1, "two": 1}),
    ],
)
def test_descriptors_are_shared_by_all_routes(monkeypatch, limit, wanted, taken):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    config = app.fit_descriptors(
        configure(**{name: {"listen": "127.0.0.1:0", "max_clients": str(n)} for name, n in wanted.items()})
    )
    assert {route.name: route.max_clients for route in config.routes} == taken
    if limit > 64:
        assert sum(n + max_lingering(n) for n in taken.values()) < limit - app.OWN_DESCRIPTORS


def test_descriptors_of_connections_and_of_targets_within_count(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1024))
    usual = {"listen": "127.0.0.1:0", "pool_size": "100", "max_clients": "500"}

    def fit(target: str) -> int:
        (route,) = app.fit_descriptors(configure(one=usual | {"target": target})).routes
        return route.max_clients

    # 2 of each connection, and in a target within its other end.
    room = 1024 - app.OWN_DESCRIPTORS - app.ROUTE_DESCRIPTORS - 200
    assert fit("127.0.0.1:1") == 500
    assert room - 101 - max_lingering(500) >= 500
    usual["max_clients"] = "5000"
    assert fit("127.0.0.1:1") == room * 4 // 5
    assert fit("embedded") == (room - 101) * 4 // 5


def test_descriptors_too_few_for_one_client_are_a_warning(caplog, monkeypatch):
    monkeypatch.setattr(LOGGER, "propagate", True)
    monkeypatch.setattr(resource, "getrlimit", lambda what: (40, 40))
    app.fit_descriptors(configure(one={"listen": "127.0.0.1:0", "target": "127.0.0.1:1", "max_clients": "1"}))
    assert caplog.messages == [
        "40 descriptors are too few for 17 of clients and 34 of gmux and its targets: clients or targets may get no"
        " connection; raise the limit to 51 (ulimit -n, or LimitNOFILE= of systemd)"
    ]


def test_client_leaves_the_descriptors_of_connections_that_are_not_made(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (100, 100))
    descriptors = Descriptors()
    made = 0
    descriptors.reserve(lambda: 10 - made)
    descriptors.reserve(lambda: 1)
    assert descriptors.may_be_a_client(69)
    assert not descriptors.may_be_a_client(70)
    made = 10
    assert descriptors.may_be_a_client(89)
    assert not descriptors.may_be_a_client(90)
    descriptors.reserve(lambda: 1000)
    assert descriptors.may_be_a_client(49)
    assert not descriptors.may_be_a_client(50)


# Reload.


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigErrors(["one thing", "another"]), ["one thing", "another"]),
        (StartError("a port"), ["a port"]),
        (RuntimeError("odd"), ["cannot read the configuration: RuntimeError('odd')"]),
        (RecursionError("deep"), ["cannot read the configuration: RecursionError('deep')"]),
    ],
)
def test_reload_whose_configuration_cannot_be_read_says_why_and_changes_nothing(caplog, monkeypatch, error, said):
    class Unreadable:
        def read_again(self):
            raise error

    monkeypatch.setattr(LOGGER, "propagate", True)
    served = Master.__new__(Master)
    served.app, served.master_pid = Unreadable(), 0
    served.LISTENERS = []
    served.handle_hup()
    assert caplog.messages == [*said, "the configuration is not changed"]
