"""Settings: every kind of value, good and bad, the defaults, and which settings contradict each other."""

from __future__ import annotations

import dataclasses
import math
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux import config
from gmux.config import Given, GivenRoute, RouteConfig, ServiceConfig
from gmux.errors import ConfigError, ConfigErrors
from gmux.settings import BY_FLAG, BY_NAME, OF_ROUTES, OF_SERVICE, SETTINGS
from tests.support.settings import read, read_route

DAY = 86400.0
TEN_YEARS = 3650 * DAY

#: For each kind of value one setting of it, what it takes with the value that becomes of it, and what it refuses.
KINDS = {
    "queue_timeout": (
        {
            "0": 0.0,
            "1": 1.0,
            "1s": 1.0,
            "1.5s": 1.5,
            "500ms": 0.5,
            "10s": 10.0,
            "5m": 300.0,
            "2h": 7200.0,
            "1d": DAY,
            "0.25": 0.25,
            "3650d": TEN_YEARS,
        },
        [
            "",
            " ",
            "-1",
            "+1",
            "1 s",
            " 1s",
            "1s ",
            "1s\n",
            "1S",
            "1us",
            "ms",
            ".5s",
            "1.",
            "1,5s",
            "1e3",
            "inf",
            "nan",
            "1_0",
            "0x1",
            "٣s",
            "3651d",
            "9" * 400,
            "one",
            "1m30s",
        ],
    ),
    "private_timeout": ({"1ms": 0.001, "5s": 5.0}, ["0", "0s", "-1s", "", "never"]),
    "connect_timeout": ({"1ms": 0.001, "10s": 10.0}, ["0", "0s", "0.0ms", "-1s", "", "soon"]),
    "connect_delay": ({"0": 0.0, "5ms": 0.005}, ["", "-1", "later"]),
    "spin": (
        {"0": 0.0, "0us": 0.0, "50us": 50e-6, "1.5us": 1.5e-6, "1ms": 0.001, "1s": 1.0, "1": 1.0},
        ["", "2", "1001ms", "1000001us", "50µs", "50US", "50 us", "us", "-1us"],
    ),
    "max_message": (
        {
            "1": 1,
            "4096": 4096,
            "64k": 65536,
            "64K": 65536,
            "16M": 1 << 24,
            "1g": 1 << 30,
            "1kb": 1024,
            "1KiB": 1024,
            "10b": 10,
        },
        ["", "0", "0k", "-1", "1.5M", "1 M", "1T", "k", "1kk", "1ki", "٣k", "1_000", "1\n", "9" * 16],
    ),
    "pool_size": (
        {"1": 1, "007": 7, "1000": 1000},
        ["", "0", "1001", "-1", "+1", "1.0", "1 ", "\uff11", "1e2", "9" * 50],
    ),
    "queue_limit": ({"0": 0, "1000000": 1000000}, ["1000001", "none"]),
    "listen": (
        {
            "8000": ("", 8000),
            "0": ("", 0),
            ":8000": ("", 8000),
            "65535": ("", 65535),
            "127.0.0.1:80": ("127.0.0.1", 80),
            "[::1]:80": ("::1", 80),
            "[fe80::1%eth0]:80": ("fe80::1%eth0", 80),
            "localhost:1": ("localhost", 1),
            "[::]:1": ("::", 1),
            "unix:/run/gmux/a.sock": "/run/gmux/a.sock",
            "unix:/a:80": "/a:80",
            "unix:/" + "x" * 106: "/" + "x" * 106,
        },
        [
            "",
            "65536",
            "-1",
            "http",
            "host",
            "host:",
            "host:http",
            "::1:80",
            "::1",
            "[::1]",
            "[::1]80",
            "[::1:80",
            "::1]:80",
            "a b:80",
            "host/path:80",
            "http://host:80",
            "host:80\n",
            "\0:80",
            "a..b:80",
            "x" * 64 + ":80",
            "host:\uff18\uff10",
            "host: 80",
            "unix:",
            "unix:a.sock",
            "unix:/",
            "unix:/a/",
            "unix:/a\0",
            "unix:/" + "x" * 107,
            "unix:/" + "\xe4" * 54,
            "UNIX:/a",
            "/a.sock",
        ],
    ),
    "target": (
        {
            "bank.example:8583": ("bank.example", 8583),
            "10.0.0.1:1": ("10.0.0.1", 1),
            "[::1]:80": ("::1", 80),
            "embedded": None,
            "unix:/a": "/a",
        },
        ["", "8000", ":8000", "host:0", "[]:80", "Embedded", "embedded ", "host", "host:65536", "unix:a", "unix:/a/"],
    ),
    "protocol": ({"echo": "echo", "mpu": "mpu"}, ["", "Echo", "echo ", "gopher", "ech"]),
    "log_format": ({"text": "text", "json": "json"}, ["", "TEXT", "xml", "text,json"]),
    "correlation": ({mode: mode for mode in ("order", "key")}, ["", "both", "KEY"]),
    "unsolicited": ({mode: mode for mode in ("close", "drop", "broadcast")}, ["", "keep", "DROP"]),
    "on_connect": (
        {"/proc/sys/kernel/ostype": b"Linux\n"},
        ["", "/does/not/exist", "/", "/dev/null", "\0"],
    ),
    "spec": ({"ascii": "ascii", "binary": "binary"}, ["", "ebcdic", "/does/not/exist.json", "/etc/passwd", "/"]),
    "key_fields": (
        {"11": ("", (11,)), "41,11": ("", (11, 41)), "0800:7,11": ("0800", (7, 11)), "2,128": ("", (2, 128))},
        ["", ",", "11,", "1", "129", "a", "800:11", "0800:", "11 41", "08x0:11", "-11", "11;41"],
    ),
    "forwarded": ({form: form for form in ("off", "x-forwarded", "forwarded")}, ["", "on", "X-Forwarded", "both"]),
    "set_header": (
        {
            "A: b": ("A", "b"),
            "A:b": ("A", "b"),
            "A: ": ("A", ""),
            "A:": ("A", ""),
            "X-A_b.c:  d: e\tf \t": ("X-A_b.c", "d: e\tf"),
            "A: \xe4": ("A", "\xe4"),
        },
        ["", "A", ": b", "A b: c", "A : b", "A: b\r\nC: d", "A: b\n", "A: \0", "A: \x7f", "A: \u20ac", "\xe4: b"],
    ),
    "host": (
        {
            "a": "a",
            "a.b-c_d": "a.b-c_d",
            "a:80": "a:80",
            "10.0.0.1:8": "10.0.0.1:8",
            "[::1]": "[::1]",
            "[::1]:8": "[::1]:8",
        },
        ["", " ", "a b", "a/b", "http://a", "u@a", ":80", "a:", "a:b", "a:123456", "::1", "a\r\nB: c", "\xe4", "a,b"],
    ),
    "verbose": ({"true": True, "false": False}, ["", "yes", "1", "True", "on"]),
    "listen_mode": (
        {"0660": 0o660, "660": 0o660, "0": 0, "7": 7, "0777": 0o777},
        ["", "8", "0o660", "01777", "1777", "u+rw", "-1", "rw", " 0660", "\uff10"],
    ),
    "listen_owner": (
        {
            "root": (0, -1),
            "root:root": (0, 0),
            ":root": (-1, 0),
            "0:0": (0, 0),
            "12345:54321": (12345, 54321),
            ":4294967294": (-1, 4294967294),
        },
        ["", ":", "root:", "no-such-user", "root:no-such-group", "4294967295", "-1", "root:root:root", "\0", " root"],
    ),
    "user": ({"root": 0, "0": 0, "12345": 12345}, ["", "no-such-user", "-1", "4294967295", "root:root", "\0"]),
    "group": ({"root": 0, "0": 0, "12345": 12345}, ["", "no-such-group", "-1", "4294967295", "9" * 11]),
    "pid": ({"a.pid": "a.pid", "/run/a b.pid": "/run/a b.pid", "\xe4": "\xe4"}, ["", "a\nb", "\0", "\udcff"]),
    "log_file": ({"-": "-", "a.log": "a.log"}, ["", "a\tb"]),
    "access_log": ({"-": "-", "a.log": "a.log"}, ["", "a\rb"]),
    "chdir": ({"/": "/", ".": "."}, ["", "/does/not/exist", "/etc/passwd", "/etc/passwd/x", "\0", "x" * 300]),
    "runtime_dir": ({"/does/not/exist": "/does/not/exist"}, ["", "\n"]),
    "name": ({"a": "a", "A.b-c_9": "A.b-c_9", "x" * 64: "x" * 64}, ["", "a b", "a/b", "x" * 65, "\xe4", "a\n", "["]),
    "worker_timeout": (
        {"0": 0, "1": 1, "30s": 30, "5m": 300, "1000ms": 1, "2.0": 2},
        ["", "500ms", "1.5s", "0.5", "-1", "soon"],
    ),
    "disk_limit": ({"0": 0, "4096": 4096, "64k": 65536, "4G": 4 << 30}, ["", "-1", "64kk", "big", "1.5G"]),
    "memory_limit": ({"64k": 65536, "512M": 512 << 20}, ["", "0", "65535", "63k", "-1", "big"]),
    "log_level": ({level: level for level in ("debug", "info", "warning", "error")}, ["", "INFO", "warn", "10"]),
}
GOOD = [(name, text, value) for name, (good, _) in KINDS.items() for text, value in good.items()]
BAD = [(name, text) for name, (_, bad) in KINDS.items() for text in bad]


@pytest.mark.parametrize(("name", "text", "value"), GOOD)
def test_setting_with_a_good_value_takes_it(name, text, value):
    taken = BY_NAME[name].parse(text)
    assert taken == (pytest.approx(value) if isinstance(value, float) else value)
    assert type(taken) is type(value)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_setting_with_a_bad_value_says_flag_value_and_what_is_allowed(name, text):
    with pytest.raises(ConfigError) as caught:
        read({name: text})
    assert_tells(str(caught.value), name, text)


def assert_tells(message: str, name: str, text: str) -> None:
    setting = BY_NAME[name]
    assert message.startswith(setting.flag + ": ")
    assert repr(text) in message
    assert message.endswith(setting.allowed)
    assert setting.allowed
    assert len(message.splitlines()) == 1


def test_kinds_tested_here_are_all_kinds():
    tested = {BY_NAME[name].kind.allowed for name in KINDS}
    counts = re.compile("a whole number from ")
    assert {s.kind.allowed for s in SETTINGS if not counts.match(s.kind.allowed)} - tested == set()


def test_protocol_with_a_typo_gets_a_suggestion():
    with pytest.raises(ConfigError, match=r"did you mean iso8583\?"):
        read({"protocol": "iso8853"})


def test_protocol_that_is_like_none_gets_no_suggestion():
    with pytest.raises(ConfigError) as caught:
        read({"protocol": "zzz"})
    assert "did you mean" not in str(caught.value)


@given(setting=st.sampled_from(SETTINGS), text=st.text())
def test_any_text_for_any_setting_gives_a_value_or_a_config_error(setting, text):
    check_any(setting, text)


@given(
    setting=st.sampled_from(SETTINGS),
    text=st.text("0123456789.:[]%-+eEkKmMgGbius dhx_\nÀ٣\ud800", max_size=30)
    | st.from_regex(r"\A[0-9]{1,400}[a-z]{0,2}\Z"),
)
def test_any_text_like_a_value_gives_a_value_or_a_config_error(setting, text):
    check_any(setting, text)


def check_any(setting, text: str) -> None:
    try:
        value = setting.parse(text)
    except ConfigError as error:
        assert_tells(f"{setting.flag}: {error}", setting.name, text)
        return
    if isinstance(value, (int, float)):
        assert math.isfinite(value)
        assert value >= 0


# The declarations.


def test_fields_of_the_configuration_are_the_settings_in_their_order():
    of_route, of_service = ([f.name for f in dataclasses.fields(kind)] for kind in (RouteConfig, ServiceConfig))
    assert of_route == ["name", *(setting.name for setting in OF_ROUTES)]
    assert of_service == [*(setting.name for setting in OF_SERVICE), "routes"]
    assert sorted(OF_ROUTES + OF_SERVICE, key=SETTINGS.index) == list(SETTINGS)


def test_flags_and_short_names_are_unique():
    assert len(BY_FLAG) == len(SETTINGS)
    shorts = [s.short for s in SETTINGS if s.short]
    assert sorted(set(shorts)) == sorted(shorts)


def test_flag_is_the_name_with_dashes():
    assert BY_NAME["upstream_idle_timeout"].flag == "--upstream-idle-timeout"


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_setting_declares_a_help_in_one_line_and_its_default_is_allowed(setting):
    assert setting.help
    assert "\n" not in setting.help + setting.default_text
    if setting.default_text:
        assert setting.default_value == setting.parse(setting.default_text)
    else:
        assert setting.default_value == setting.kind.empty


def test_groups_are_contiguous():
    # The help prints a heading each time the group changes.
    groups = [s.group for s in SETTINGS]
    assert len([g for at, g in enumerate(groups) if at == 0 or groups[at - 1] != g]) == len(set(groups))


def test_defaults_are_those_of_the_design():
    service, defaults = read({}), read_route({})
    assert defaults.protocol == "echo"
    assert defaults.listen == ("", 8000)
    assert defaults.target == ("127.0.0.1", 1234)
    assert (defaults.pool_size, defaults.pool_min) == (1, 1)
    assert defaults.max_message == 16 << 20
    assert (service.verbose, service.quiet, service.unsafe_dump) == (False, False, False)
    # Invariants 6 and 8: nothing waits for ever, and nothing grows for ever, unless someone asked for it.
    assert min(defaults.queue_timeout, defaults.connect_timeout, defaults.timeout, defaults.request_timeout) > 0
    assert min(defaults.queue_limit, defaults.max_clients, defaults.spool_limit, service.memory_limit) > 0


@pytest.mark.parametrize(("processors", "spin"), [({0}, 0.0), ({0, 3}, 50e-6)])
def test_default_of_spin_needs_two_processors(monkeypatch, processors, spin):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: processors)
    assert read({}).spin == pytest.approx(spin)


def test_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        read_route({}).pool_size = 2


# Settings that meet.


def refused(**given_texts: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(given_texts)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def test_pool_min_above_pool_size_is_refused():
    message = refused(pool_min="3", pool_size="2")
    assert message == "--pool-min: '3' is not allowed: at most --pool-size, which is 2"


def test_pool_min_of_pool_size_is_allowed():
    assert read_route({"pool_min": "2", "pool_size": "2"}).pool_min == 2


def test_idle_timeout_without_pool_min_keeps_no_connection_open():
    assert read_route({"upstream_idle_timeout": "5m"}).pool_min == 0


def test_idle_timeout_of_zero_without_pool_min_keeps_the_default():
    assert read_route({"upstream_idle_timeout": "0"}).pool_min == 1


def test_idle_timeout_with_pool_min_below_pool_size_is_allowed():
    taken = read_route({"upstream_idle_timeout": "5m", "pool_min": "1", "pool_size": "2"})
    assert (taken.pool_min, taken.upstream_idle_timeout) == (1, 300.0)


def test_idle_timeout_that_could_close_nothing_is_refused():
    message = refused(upstream_idle_timeout="5m", pool_min="2", pool_size="2")
    assert message.startswith("--upstream-idle-timeout: ")
    assert "--pool-min 2" in message
    assert "--pool-size is 2" in message


@pytest.mark.parametrize("delay", ["10s", "11s"])
def test_connect_delay_not_below_the_queue_timeout_is_refused(delay):
    message = refused(connect_delay=delay, queue_timeout="10s")
    assert message.startswith(f"--connect-delay: '{delay}' is not allowed")
    assert "--queue-timeout, which is 10s" in message


@pytest.mark.parametrize(("delay", "limit"), [("9s", "10s"), ("1h", "0")])
def test_connect_delay_below_the_queue_timeout_or_without_one_is_allowed(delay, limit):
    read({"connect_delay": delay, "queue_timeout": limit})


def test_quiet_with_verbose_is_refused():
    message = refused(quiet="true", verbose="true")
    assert "--quiet" in message
    assert "--verbose" in message


@pytest.mark.parametrize("flag", ["quiet", "verbose"])
def test_log_level_with_a_flag_that_says_it_is_refused(flag):
    message = refused(**{flag: "true", "log_level": "error"})
    assert message == f"--log-level: 'error' is not allowed together with --{flag}, which says it already"


def test_more_workers_than_connections_are_refused():
    message = refused(workers="3", pool_size="2")
    assert message.startswith("--workers: '3' is not allowed: at most --pool-size, which is 2, as a worker without")
    assert read({"workers": "2", "pool_size": "2"}).workers == 2


def test_workers_with_the_embedded_target_are_refused():
    assert refused(workers="2", pool_size="2", target="embedded").startswith(
        "--workers: '2' is not allowed with --target embedded"
    )


@pytest.mark.parametrize("name", ["listen_mode", "listen_owner"])
def test_mode_and_owner_of_a_socket_are_refused_with_a_port(name):
    given_texts = {name: {"listen_mode": "0600", "listen_owner": "root"}[name]}
    assert refused(**given_texts).endswith("is not allowed with a port: it is for --listen unix:/PATH alone")
    read({"listen": "unix:/a"} | given_texts)


def test_upstream_max_age_not_above_connect_delay_is_refused():
    """Such a connection would be too old for its first request, for ever."""
    with pytest.raises(ConfigError, match=r"--upstream-max-age: '0\.2s' is not allowed: .* --connect-delay"):
        read({"upstream_max_age": "200ms", "connect_delay": "400ms"})


# Several routes.


def routes_of(*routes: dict[str, str]) -> list[GivenRoute]:
    """Each with a name, a port and a place of its own, where it says nothing else."""
    found = []
    for number, texts in enumerate(routes):
        texts = {"listen": str(8001 + number), "name": f"r{number}"} | texts
        name = texts.pop("name")
        where = f"a.toml:{number}"
        found.append(GivenRoute({n: Given(t, f"{where}: {BY_NAME[n].key}") for n, t in texts.items()}, name, where))
    return found


def problems_of(*routes: dict[str, str], **service: str) -> list[str]:
    texts = {name: Given(text, BY_NAME[name].flag) for name, text in service.items()}
    try:
        config.read(texts, routes_of(*routes))
    except ConfigErrors as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    ("routes", "said"),
    [
        (({}, {}), []),
        (({"listen": "0"}, {"listen": "0"}), []),
        (({"listen": "h:0"}, {"listen": "h:0"}), []),
        (({"listen": "unix:/a"}, {"listen": "unix:/b"}), []),
        (({"target": "embedded"}, {"target": "embedded", "pool_size": "2"}), []),
        (({"pool_size": "2"}, {"pool_size": "2"}), []),
        (({"pool_size": "2"}, {"pool_size": "3", "target": "b:1"}), []),
        (({"pool_size": "2"}, {"pool_size": "3", "budget": "b"}), []),
        (({"name": ""},), []),
        (({"listen": "1"}, {"listen": "1"}), ["a.toml:1: listen: is not allowed: the route r0 listens there already"]),
        (
            ({"listen": "unix:/a"}, {"listen": "unix:/a"}),
            ["a.toml:1: listen: is not allowed: the route r0 listens there already"],
        ),
        (
            ({"pool_size": "2"}, {}),
            [
                "a.toml:1: pool-size: '1' is not allowed: it is 2 in the route r0, which shares the connections to the"
                " target"
            ],
        ),
        (
            ({"budget": "b", "target": "a:1"}, {"budget": "b", "target": "b:1", "pool_size": "2"}),
            [
                "a.toml:1: pool-size: '2' is not allowed: it is 1 in the route r0, which shares the connections to the"
                " target"
            ],
        ),
        (({}, {"name": ""}), ["a.toml:1: name: is missing: each of several routes needs one"]),
        (
            ({}, {"name": "r0"}),
            [f"a.toml:{number}: name: 'r0' is not allowed: another route has this name" for number in (0, 1)],
        ),
        (
            ({"pool_size": "x"}, {"pool_min": "2"}, {"timeout": "soon", "queue_limit": "-1"}),
            [
                "a.toml:0: pool-size: 'x' is not allowed: a whole number from 1 to 1000",
                "a.toml:1: pool-min: '2' is not allowed: at most --pool-size, which is 1",
                "a.toml:2: queue-limit: '-1' is not allowed: a whole number from 0 to 1000000",
                "a.toml:2: timeout: 'soon' is not allowed: a time such as 500ms, 10s, 5m, or 0 for no limit",
            ],
        ),
    ],
)
def test_several_routes_are_told_what_they_cannot_have_in_common(routes, said):
    assert problems_of(*routes) == said


def test_workers_beyond_the_pool_of_one_route_name_the_route():
    (problem,) = problems_of({"pool_size": "2"}, {"target": "b:1"}, workers="2")
    assert problem.startswith("--workers: '2' is not allowed: at most --pool-size of the route r1, which is 1")


def test_codec_that_cannot_be_made_is_told_at_its_route(tmp_path):
    file = tmp_path / "spec.json"
    file.write_text("{}")
    routes = routes_of({}, {"protocol": "iso8583", "pipeline": "2", "spec": str(file)})
    with pytest.raises(ConfigErrors) as caught:
        config.verify(config.read({}, routes), routes)
    (problem,) = caught.value.problems
    assert problem.startswith("a.toml:1: spec: ")
