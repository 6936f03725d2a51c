"""Flags, variables and a file become one configuration: which goes first, what is refused, and where that is."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gmux import sources, toml_lines
from gmux.config import Given
from gmux.errors import ConfigErrors
from gmux.settings import BY_NAME, OF_ROUTES, OF_SERVICE, SETTINGS
from gmux.sources import Loaded


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text: str | bytes | None = None, environ: dict[str, str] | None = None, **flags: str | list[str]) -> Loaded:
    """With `text` as the file gmux.toml. Raises ConfigErrors."""
    if text is not None:
        Path("gmux.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        flags["config"] = "gmux.toml"
    return sources.load({n: Given(t, BY_NAME[n].flag) for n, t in flags.items()}, environ or {})


def problems(text: str | bytes | None = None, environ: dict[str, str] | None = None, **flags: str) -> tuple[str, ...]:
    with pytest.raises(ConfigErrors) as caught:
        load(text, environ, **flags)
    for problem in caught.value.problems:
        assert problem.isprintable()
    return caught.value.problems


def problem(text: str | bytes | None = None, environ: dict[str, str] | None = None, **flags: str) -> str:
    (one,) = problems(text, environ, **flags)
    return one


# What goes first.


def test_nothing_given_is_one_route_of_defaults():
    loaded = load()
    (route,) = loaded.config.routes
    assert (route.name, route.pool_size, route.listen) == ("", 1, ("", 8000))
    assert (loaded.texts, loaded.warnings, len(loaded.routes)) == ({}, (), 1)


ROUTE = '[[route]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("text", "variable", "flag", "taken"),
    [
        ("[defaults]\npool-size = 2\n" + ROUTE + "pool-size = 3", "4", "5", 5),
        ("[defaults]\npool-size = 2\n" + ROUTE + "pool-size = 3", "4", "", 4),
        ("[defaults]\npool-size = 2\n" + ROUTE + "pool-size = 3", "", "", 3),
        ("[defaults]\npool-size = 2\n" + ROUTE, "", "", 2),
        ("[defaults]\npool-size = 2\n", "", "", 2),
        ("[defaults]\npool-size = 2\n", "4", "", 4),
        (ROUTE, "", "", 1),
        ("", "", "5", 5),
    ],
)
def test_setting_of_a_route_is_that_of_flag_variable_route_defaults_in_this_order(text, variable, flag, taken):
    loaded = load(text, {"GMUX_POOL_SIZE": variable}, **({"pool_size": flag} if flag else {}))
    assert loaded.config.routes[0].pool_size == taken


@pytest.mark.parametrize(
    ("variable", "flag", "taken"), [("debug", "error", "error"), ("debug", "", "debug"), ("", "", "warning")]
)
def test_setting_of_the_service_is_that_of_flag_variable_file_in_this_order(variable, flag, taken):
    flags = {"log_level": flag} if flag else {}
    assert load('[service]\nlog-level = "warning"', {"GMUX_LOG_LEVEL": variable}, **flags).config.log_level == taken


def test_each_given_names_its_place():
    text = "[service]\nworkers = 2\n\n[defaults]\npool-size = 2\n" + ROUTE + "pool-min = 2\n"
    loaded = load(text, {"GMUX_TIMEOUT": "5s"}, queue_timeout="7s")
    (route,) = loaded.routes
    assert loaded.texts["workers"] == Given("2", "gmux.toml:2: workers")
    assert (route.name, route.where) == ("a", "gmux.toml:6")
    assert {name: given.where for name, given in route.texts.items()} == {
        "name": "gmux.toml:7: name",
        "pool_size": "gmux.toml:5: pool-size",
        "pool_min": "gmux.toml:8: pool-min",
        "timeout": "GMUX_TIMEOUT",
        "queue_timeout": "--queue-timeout",
    }


def test_flag_of_a_route_goes_to_every_route():
    loaded = load(TWO, timeout="5s")
    assert [route.timeout for route in loaded.config.routes] == [5, 5]


# Values of a file.

TWO = '[[route]]\nname = "a"\nlisten = 8001\n[[route]]\nname = "b"\nlisten = 8002\n'


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("pool-size = 1_0", "pool_size", 10),
        ('pool-size = "10"', "pool_size", 10),
        ("timeout = 1.5", "timeout", 1.5),
        ('timeout = "500ms"', "timeout", 0.5),
        ("listen = 8001", "listen", ("", 8001)),
        ("prefer-pipeline = true\npipeline = 2", "prefer_pipeline", True),
        ('prefer-pipeline = "false"', "prefer_pipeline", False),
        ('protocol = "http"\nvia = false', "via", False),
        ('protocol = "http"\nset-header = "A: b"', "set_header", (("A", "b"),)),
        ('protocol = "http"\nset-header = ["A: b", "C:"]', "set_header", (("A", "b"), ("C", ""))),
        ('protocol = "http"\nset-header = []', "set_header", ()),
        ('protocol = "iso8583"\npipeline = 2\nkey-fields = 11', "key_fields", (("", (11,)),)),
        (
            'protocol = "iso8583"\npipeline = 2\nkey-fields = [11, "0800:7"]',
            "key_fields",
            (("", (11,)), ("0800", (7,))),
        ),
        ('listen = "unix:/a"\nlisten-mode = "0600"', "listen_mode", 0o600),
    ],
)
def test_value_of_a_file_is_taken(line, name, value):
    assert getattr(load(ROUTE + line).config.routes[0], name) == value


COUNT = "a whole number from 1 to 1000"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pool-size = 0", f"pool-size: '0' is not allowed: {COUNT}"),
        ("pool-size = 2.0", f"pool-size: '2.0' is not allowed: {COUNT}"),
        ("pool-size = true", f"pool-size: true is not allowed: {COUNT}"),
        ("pool-size = [2]", f"pool-size: an array is not allowed: {COUNT}"),
        ("pool-size = {}", f"pool-size: a table is not allowed: {COUNT}"),
        ("pool-size.x = 1", f"pool-size: a table is not allowed: {COUNT}"),
        ("pool-size = 2026-11-22", f"pool-size: 2026-11-22 is not allowed: {COUNT}"),
        ("pool-size = 07:32:00", f"pool-size: 07:32:00 is not allowed: {COUNT}"),
        ("pool-size = " + "0x" + "f" * 5000, f"pool-size: a number with so many digits is not allowed: {COUNT}"),
        ("timeout = inf", "timeout: 'inf' is not allowed: a time such as 500ms, 10s, 5m, or 0 for no limit"),
        ("timeout = nan", "timeout: 'nan' is not allowed: a time such as 500ms, 10s, 5m, or 0 for no limit"),
        ("prefer-pipeline = 1", "prefer-pipeline: '1' is not allowed: true or false"),
        ("listen-mode = 0o660", "listen-mode: 432 without quotes is not allowed: an octal mode such as 0660"),
        ("listen-mode = 660", "listen-mode: 660 without quotes is not allowed: an octal mode such as 0660"),
        ("budget = true", "budget: true is not allowed: 1 to 64 letters, digits, dots, dashes and underscores"),
        ('name = "a b"', "name: 'a b' is not allowed: 1 to 64 letters, digits, dots, dashes and underscores"),
        ('protocol = "htp"', "protocol: 'htp' is not allowed: did you mean http? one of "),
        (
            "set-header = [['A: b']]",
            "set-header: an array is not allowed: NAME: VALUE, or NAME: to remove the field; or an",
        ),
        ("set-header = [2026-11-22]", "set-header: 2026-11-22 is not allowed: NAME: VALUE"),
        ("set-header = ['A: b', 'C']", "set-header: 'C' is not allowed: NAME: VALUE"),
        ("pool-sise = 2", "pool-sise: is not known: did you mean pool-size?"),
        ("pool_size = 2", "pool_size: is not known: did you mean pool-size?"),
        ("zzz = 2", "zzz: is not known: gmux server --help lists the settings"),
        ('"a\\nb" = 2', r"'a\nb': is not known"),
        ('"" = 2', "'': is not known"),
        ("workers = 2", "workers: is a setting of the service: it belongs in [service]"),
        ("worker = 2", "worker: is not known: did you mean workers?"),
        ("config = 'x'", "config: is not allowed: a file cannot name another"),
    ],
)
def test_wrong_line_of_a_route_is_told_with_its_place(line, message):
    assert problem("[[route]]\n" + line).startswith("gmux.toml:2: " + message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[service]\npool-size = 2", "2: pool-size: is a setting of routes: it belongs in [defaults] or [[route]]"),
        ("[service]\nlisten = 2", "2: listen: is a setting of routes: it belongs in [[route]]"),
        (
            "[defaults]\nname = 2",
            "2: name: is a setting of the service and of routes: it belongs in [service] or [[route]]",
        ),
        (
            "[defaults]\nlisten = 2",
            "2: listen: is not allowed in [defaults], as no two routes can have the same: it belong",
        ),
        ("\npool-size = 2", "2: pool-size: is a setting of routes: it belongs in [defaults] or [[route]]"),
        ("pool-sise = 2", "1: pool-sise: is not known: did you mean pool-size?"),
        ("[servce]\n", "1: [servce]: is not known: did you mean [service]?"),
        ("[[routes]]\n", "1: [routes]: is not known: did you mean [[route]]?"),
        ("[zzz]\n", "1: [zzz]: is not known: a file has [service], [defaults] and any number of [[route]]"),
        ("[[service]]\n", "1: service: is not allowed in this form: write [service]"),
        ("[route]\n", "1: route: is not allowed in this form: write [[route]]"),
        ("defaults = 3\n", "1: defaults: is not allowed in this form: write [defaults]"),
        ("route = [1]\n", "1: route: is not allowed in this form: write [[route]]"),
        ("[service]\nconfig = 'x'", "2: config: is not allowed: a file cannot name another"),
        ("[service]\nworkers =\n", "2: this is not TOML: Invalid value, at column 10"),
        ("[service]\n[service]\n", "2: this is not TOML: "),
        ("a = '''\n\n", "2: this is not TOML: Expected "),
    ],
)
def test_wrong_file_is_told_with_its_line(text, message):
    assert problem(text).startswith("gmux.toml:" + message)


def test_all_problems_come_at_once_in_the_order_of_the_file():
    text = (
        "[service]\nworkers = 'x'\nzzz = 1\n"  # 1
        '[[route]]\nname = "a"\nlisten = 8001\npool-min = 2\n'  # 4
        '[[route]]\nname = "b"\nlisten = 8002\npool-sise = 2\npool-min = 2\n'  # 8
        '[[route]]\nname = "a"\nlisten = 8001\n'  # 13
    )
    found = problems(text, {"GMUX_LOG_LEVEL": "loud"}, umask="9")
    assert [each.partition(": ")[0] for each in found] == [
        "--umask",
        "GMUX_LOG_LEVEL",
        "gmux.toml:2",
        "gmux.toml:3",
        "gmux.toml:5",  # the name is that of another
        "gmux.toml:7",
        # Not 12: how the settings of a route fit is not told where one of them is unknown.
        "gmux.toml:11",
        "gmux.toml:14",
        "gmux.toml:15",
    ]


def test_flag_that_is_wrong_for_all_routes_is_told_once():
    assert problem(TWO, pool_min="2").startswith("--pool-min: '2' is not allowed: at most --pool-size")


def test_flag_that_is_for_the_protocol_of_some_routes_names_the_others():
    assert problem(MIXED, spec="ascii") == (
        "--spec: is not allowed with --protocol echo of the route a: it is for iso8583, mpu alone"
    )


@pytest.mark.parametrize("place", ["--listen", "GMUX_LISTEN"])
def test_listen_by_flag_or_variable_with_several_routes_is_refused(place):
    given = {"listen": "1"} if place == "--listen" else {"environ": {"GMUX_LISTEN": "1"}}
    assert problem(TWO, **given) == (
        f"{place}: '1' is not allowed with the 2 routes of gmux.toml: no two can listen at one address, so it belongs"
        " in each [[route]]"
    )


def test_listen_by_flag_with_one_route_is_that_of_the_route():
    assert load(ROUTE + "listen = 1", listen="2").config.routes[0].listen == ("", 2)


def test_default_of_listen_in_two_routes_is_told_at_the_second():
    text = '[[route]]\nname = "a"\n[[route]]\nname = "b"\n'
    assert problem(text) == "gmux.toml:3: listen: is not allowed: the route a listens there already"


# Routes of several protocols.

MIXED = '[defaults]\nspec = "binary"\npipeline = 2\n' + TWO + 'protocol = "iso8583"\n'


def test_default_that_is_for_another_protocol_is_left_out():
    a, b = load(MIXED).config.routes
    assert (a.spec, b.spec) == ("auto", "binary")


def test_default_that_no_route_has_a_protocol_for_is_warned_of():
    loaded = load('[defaults]\nhost = "x"\n' + MIXED.removeprefix("[defaults]\n"))
    assert loaded.warnings == ("gmux.toml:2: host: has no effect: no route has a protocol that it is for",)


def test_default_for_another_protocol_without_any_route_is_refused():
    assert problem('[defaults]\nhost = "x"').startswith("gmux.toml:2: host: is not allowed with --protocol echo")


# The file itself.


@pytest.mark.parametrize("name", ["missing.toml", ".", "/proc/self/mem"])
def test_file_that_cannot_be_read_is_told_in_one_line(name):
    assert problem(config=name).startswith(f"--config: {name!r} cannot be read: ")


def test_file_named_by_the_variable_is_read():
    Path("other.toml").write_text("[service]\nworkers = 0\n")
    assert problem(environ={"GMUX_CONFIG": "other.toml"}).startswith("other.toml:2: workers: '0' is not allowed")
    assert problem(environ={"GMUX_CONFIG": "missing"}).startswith("GMUX_CONFIG: 'missing' cannot be read")


@pytest.mark.parametrize("name", ["", "a\nb", "\0", "\udcff"])
def test_name_that_is_none_of_a_file_is_told_once(name):
    assert re.fullmatch(r"--config: '.*' is not allowed: the name of a file", problem(config=name))


def test_file_of_one_mebibyte_is_read_and_one_byte_more_is_not():
    assert load(b"#" * (1 << 20)).config.workers == 1
    assert problem(b"#" * ((1 << 20) + 1)) == "--config: 'gmux.toml' is not allowed: a file of at most 1 MiB"


def test_file_that_is_not_utf_8_is_told_with_its_line():
    assert problem(b"# a\n# \xe4\n") == "gmux.toml:2: byte 0xe4 is not allowed: a file of UTF-8"


def test_mark_at_the_beginning_and_line_ends_of_other_systems_are_taken():
    assert load(b"\xef\xbb\xbf[service]\r\nlog-level = 'debug'\r\n").config.log_level == "debug"


def test_file_nested_too_deeply_is_told_in_one_line():
    assert problem("a = " + "[" * 100_000) == "gmux.toml: this is nested too deeply"


def test_number_of_too_many_digits_is_told_in_one_line():
    assert problem("a = " + "9" * 5000) == "gmux.toml: a number in it has too many digits"


def test_file_is_found_again_after_the_process_has_moved(tmp_path, monkeypatch):
    """As a reload does, once --chdir is done."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "hello").write_bytes(b"hello")
    text = '[service]\nchdir = "sub"\npid = "a.pid"\n[defaults]\non-connect = "hello"\n'
    Path("gmux.toml").write_text(text)
    flags = {"config": Given("gmux.toml", "--config")}
    first = sources.load(flags, {}, str(tmp_path))
    monkeypatch.chdir("sub")
    assert sources.load(flags, {}, str(tmp_path)).config == first.config
    assert (first.config.config, first.config.chdir) == (str(tmp_path / "gmux.toml"), str(tmp_path / "sub"))
    assert first.config.pid == str(tmp_path / "sub" / "a.pid")
    assert first.config.routes[0].on_connect == b"hello"


@pytest.mark.parametrize("name", ["log_file", "access_log"])
def test_dash_is_no_file_of_that_name(name):
    assert getattr(load(**{name: "-"}).config, name) == "-"
    assert load(pid="-").config.pid == os.path.abspath("-")


def test_file_with_the_name_of_a_spec_is_made_absolute():
    Path("ascii").write_text("")
    assert load(config="ascii").config.config == os.path.abspath("ascii")


# The environment.


def test_every_setting_has_a_variable_and_a_key_in_one_table():
    assert len({s.variable for s in SETTINGS}) == len(SETTINGS)
    assert set(sources.TABLES["service"]) == {s.key for s in OF_SERVICE} - {"config"}
    assert set(sources.TABLES["route"]) == {s.key for s in OF_ROUTES} | {"name"}
    assert set(sources.TABLES["defaults"]) == {s.key for s in OF_ROUTES} - {"listen"}


def test_variable_of_a_setting_that_repeats_has_a_value_in_each_line():
    environ = {"GMUX_SET_HEADER": "A: b\nC: d, e\n", "GMUX_PROTOCOL": "http"}
    assert load(environ=environ).config.routes[0].set_header == (("A", "b"), ("C", "d, e"))


def test_variable_of_a_flag_that_is_on_has_the_value_of_the_key():
    assert load(environ={"GMUX_VIA": "false", "GMUX_PROTOCOL": "http"}).config.routes[0].via is False


def test_wrong_variable_is_told_by_its_name():
    assert problem(environ={"GMUX_POOL_SIZE": "x"}) == f"GMUX_POOL_SIZE: 'x' is not allowed: {COUNT}"


def test_unknown_variable_like_a_known_one_is_warned_of():
    environ = {"GMUX_POOLSIZE": "3", "GMUX_WORKER": "2", "GMUX_TIMOUT": ""}
    assert load(environ=environ).warnings == (
        "GMUX_POOLSIZE is not known: did you mean GMUX_POOL_SIZE?",
        "GMUX_WORKER is not known: did you mean GMUX_WORKERS?",
    )


def test_variables_of_kubernetes_and_of_others_are_passed_over():
    names = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_8000_TCP", "PORT_8000_TCP_PROTO"]
    names += ["PORT_8000_TCP_PORT", "PORT_8000_TCP_ADDR"]
    environ = {"GMUX_" + name: "tcp://10.0.0.1:8000" for name in names} | {"POOL_SIZE": "x", "GMUX": "x"}
    assert load(environ=environ).warnings == ()


# The lines of keys, against tomllib itself.

KEYS = st.sampled_from(["a", "b", "pool-size", '"a b"', "'#'", '"\\""', '"]"', "''", "1"])
STRINGS = st.sampled_from(
    [
        '"a"',
        "'b'",
        '"\\"#"',
        "'\\'",
        '""',
        '"""\n[x]\n"""',
        '"""a""b""\\""""',
        '""""""""',
        "'''\n'''''",
        "'''a''b\n='''",
        '"""\\\\"""',
        '"""# \\\n   x"""',
        '"["',
        '"""a""""',
        "'''b''''",
        "'{'",
    ]
)
VALUES = st.recursive(
    STRINGS | st.sampled_from(["1", "1.5", "true", "2026-11-22 07:32:00", "inf"]),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: "[ # ]\n" + ",\n\n".join(items) + "]")
        | st.lists(inner, max_size=2).map(
            lambda items: "{" + ", ".join(f"k{n} = {item}" for n, item in enumerate(items)) + "}"
        )
    ),
    max_leaves=6,
)
NAMES = st.lists(KEYS, min_size=1, max_size=3).map(" . ".join)
STATEMENTS = st.one_of(
    st.tuples(NAMES, VALUES).map(lambda pair: f" {pair[0]} = {pair[1]} # ' \" ["),
    NAMES.map(lambda name: f"[ {name} ] # ["),
    NAMES.map(lambda name: f"\t[[{name}]]"),
    st.just(""),
    st.just("# \"\"\" '''"),
)


@given(st.lists(STATEMENTS, max_size=12), st.sampled_from(["\n", "\r\n"]))
def test_lines_are_those_of_the_statements_and_of_all_that_tomllib_finds(statements, end):
    text = ""
    begins = []
    for statement in statements:
        try:
            tomllib.loads(text + statement)
        except tomllib.TOMLDecodeError:
            continue  # it defines again what is there
        begins.append(text.count("\n") + 1)
        text += statement.replace("\n", end) + end
    lines = toml_lines.find_lines(text)
    assert set(lines) == set(toml_lines.paths(tomllib.loads(text)))
    assert set(lines.values()) <= set(begins)


def test_lines_of_all_forms():
    text = (
        "\n[service] # [x]\n'name' = '''\n]\n'''' # ' [\n\n"  # 1
        '[[route]]\npool-size.x = """a"""" # " [\nset-header = [ # "\n"a",\n]\n'  # 7
        '[[route]]\na = { b = "\\"", c = 1 }\n'  # 12
        "[defaults.x]\n"  # 14
    )
    assert toml_lines.find_lines(text) == {
        ("service",): 2,
        ("service", "name"): 3,
        ("route",): 7,
        ("route", 0): 7,
        ("route", 0, "pool-size"): 8,
        ("route", 0, "pool-size", "x"): 8,
        ("route", 0, "set-header"): 9,
        ("route", 0, "set-header", 0): 9,
        ("route", 1): 12,
        ("route", 1, "a"): 13,
        ("route", 1, "a", "b"): 13,
        ("route", 1, "a", "c"): 13,
        ("defaults",): 14,
        ("defaults", "x"): 14,
    }


# Any file.


def check_any(text: str | bytes) -> None:
    try:
        load(text)
    except ConfigErrors as error:
        found = error.problems
    else:
        return
    assert found
    assert all(each.startswith(("gmux.toml:", "--")) and each.isprintable() for each in found)


@given(st.binary() | st.text().map(lambda text: text.encode(errors="surrogatepass")))
@example(b"a = " + b"[" * 5000 + b"]" * 5000)
@example(b".".join([b"a"] * 3000) + b" = 1")
def test_any_bytes_give_a_configuration_or_its_errors(text):
    check_any(text)


LINES = st.tuples(
    st.sampled_from([s.key for s in SETTINGS] + ["name", "service", "route", "zzz", '"\\n"']),
    VALUES | st.integers().map(str) | st.sampled_from(["'http'", "'iso8583'", "'unix:/a'", "2", "true"]),
).map(" = ".join)


@given(st.lists(LINES | st.sampled_from(["[service]", "[defaults]", "[[route]]", "[x]", "[route.a]"]), max_size=12))
def test_any_settings_give_a_configuration_or_its_errors(lines):
    check_any("\n".join(lines))
