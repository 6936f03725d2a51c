"""`gmux check` and what `gmux server` says of a configuration, as processes and by their printed settings."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gmux import cli, effective, sources
from gmux.config import Given
from gmux.errors import ConfigErrors
from gmux.kinds import FLAG
from gmux.settings import BY_NAME, OF_ROUTES, SETTINGS
from gmux.sources import Loaded

#: No machine has this address (RFC 5737), so a server that got as far as listening says so and ends.
NOWHERE = "192.0.2.1:8000"


def run(*words: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gmux", *words]
    return subprocess.run(command, env=os.environ | environ, cwd=cwd, capture_output=True, text=True, timeout=60)


def write(folder: Path, text: str) -> None:
    (folder / "gmux.toml").write_text(text)


# What check says, and its exit code.


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "1 route"), ("[[route]]", "1 route"), ('[[route]]\nname="a"\n[[route]]\nname="b"\nlisten=1', "2 routes")],
)
def test_check_of_a_right_configuration_counts_its_routes(tmp_path, text, said):
    write(tmp_path, text)
    done = run("check", "--config", "gmux.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"the configuration is valid: {said}\n", "")


def test_check_takes_the_options_of_the_server_and_needs_none():
    for words in ([], ["-p", "http", "-l", NOWHERE, "--set-header", "A: b", "--set-header", "C: d", "-q"]):
        done = run("check", *words)
        assert (done.returncode, done.stdout) == (0, "the configuration is valid: 1 route\n")


WRONG = "[service]\nworkers = 0\n[[route]]\npool-sise = 3\n"
OF_FILE = [
    "gmux: gmux.toml:2: workers: '0' is not allowed: a whole number from 1 to 1000",
    "gmux: gmux.toml:4: pool-sise: is not known: did you mean pool-size?",
]
OF_FLAG = "gmux: --timeout: 'soon' is not allowed: a time such as 500ms, 10s, 5m, or 0 for no limit"
OF_VARIABLE = "gmux: GMUX_SPIN: '2' is not allowed: a time such as 50us or 1ms, at most 1s, or 0 for none"


@pytest.mark.parametrize(
    ("command", "words", "variable", "code", "lines"),
    [
        ("check", ["--config", "gmux.toml"], "", 1, OF_FILE),
        ("check", ["--config", "gmux.toml", "--timeout", "soon"], "2", 1, [OF_FLAG, OF_VARIABLE, *OF_FILE]),
        ("check", ["--timeout", "soon"], "", 1, [OF_FLAG]),
        ("server", ["--config", "gmux.toml"], "", 1, OF_FILE),
        ("server", ["--config", "gmux.toml", "--timeout", "soon"], "2", 1, [OF_FLAG, OF_VARIABLE, *OF_FILE]),
        ("server", ["--timeout", "soon"], "2", 2, [OF_FLAG, OF_VARIABLE]),
        ("server", [], "2", 2, [OF_VARIABLE]),
    ],
)
def test_problems_are_a_line_each_with_the_exit_code(tmp_path, command, words, variable, code, lines):
    write(tmp_path, WRONG)
    done = run(command, *words, cwd=tmp_path, GMUX_SPIN=variable)
    assert (done.stderr.splitlines(), done.returncode, done.stdout) == (lines, code, "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["server", "--print"], "--print is not for gmux server"),
        (["list", "--print"], "--print is not for gmux list"),
        (["check", "--print", "--print"], "--print is given twice"),
        (["check", "--print=1"], "--print takes no value"),
        (["check", "--prin"], "unknown option --prin (did you mean --print?)"),
        (["check", "--pool-sise", "2"], "unknown option --pool-sise (did you mean --pool-size?)"),
        (["check", "check"], "unexpected word 'check'"),
    ],
)
def test_command_line_that_cannot_be_read_ends_with_code_2(words, message):
    done = run(*words)
    assert message in done.stderr
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)


def test_warnings_of_check_go_to_standard_error():
    done = run("check", GMUX_POOLSIZE="3")
    assert done.stderr == "gmux: warning: GMUX_POOLSIZE is not known: did you mean GMUX_POOL_SIZE?\n"
    assert done.returncode == 0


def test_warnings_of_server_are_told_as_those_of_check():
    done = run("server", "-l", NOWHERE, GMUX_POOLSIZE="3")
    logged, _ = done.stderr.splitlines()
    assert logged == "gmux: warning: GMUX_POOLSIZE is not known: did you mean GMUX_POOL_SIZE?"


def test_server_takes_its_address_from_the_file(tmp_path):
    write(tmp_path, f'[[route]]\nlisten = "{NOWHERE}"')
    done = run("server", cwd=tmp_path, GMUX_CONFIG="gmux.toml")
    assert done.stderr == f"gmux: cannot listen on {NOWHERE}: Cannot assign requested address\n"


def test_server_can_load_again_wherever_it_has_gone_since(tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("gmux.app.serve", lambda *given: served.append(given))
    monkeypatch.setattr("gmux.logs.configure", lambda config: None)
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "[service]\nworkers = 1")
    cli.main(["server", "--config", "gmux.toml"])
    ((first, load),) = served
    monkeypatch.chdir("/")
    assert load() == first
    write(tmp_path, "[service]\nworkers = 1\nlog-level = 'debug'")
    assert load() == dataclasses.replace(first, log_level="debug")
    write(tmp_path, "[service]\nworkers = 'x'")
    with pytest.raises(ConfigErrors, match=r"^gmux\.toml:2: workers: 'x' is not allowed"):
        load()


# What --print prints.

TEXT = """
[service]
workers = 2
[defaults]
pool-size = 2
upstream-idle-timeout = 60
[[route]]
name = "bank"
protocol = "iso8583"
pipeline = 8
key-fields = [11, "0800:7,11"]
[[route]]
name = "device"
protocol = "http"
listen = "[::1]:80"
via = false
"""


def test_print_names_each_setting_with_its_value_and_origin(tmp_path):
    write(tmp_path, TEXT)
    done = run("check", "--config", "gmux.toml", "--print", "--timeout", "5s", cwd=tmp_path, GMUX_QUEUE_TIMEOUT="9.5")
    service, bank, device = (part.splitlines() for part in done.stdout.split("\n\n"))
    assert (done.returncode, done.stderr) == (0, "")
    assert service[:3] == ["[service]", "workers = 2  # gmux.toml:3", 'worker-timeout = "30s"  # default']
    assert bank[:2] == ["[[route]]", 'name = "bank"  # gmux.toml:8']
    assert 'key-fields = ["11", "0800:7,11"]  # gmux.toml:11' in bank
    assert "pool-size = 2  # gmux.toml:5" in bank
    # Not the usual 1, as connections may be idle.
    assert "pool-min = 0  # default" in bank
    assert 'correlation = "key"  # default' in bank
    assert "via = false  # gmux.toml:16" in device
    assert 'forwarded = "off"  # default' in device
    assert not [line for line in device if line.startswith(("spec", "correlation"))]
    for route in (bank, device):
        assert 'timeout = "5s"  # --timeout' in route
        assert 'queue-timeout = "9.5"  # GMUX_QUEUE_TIMEOUT' in route


def printed_again(loaded: Loaded, folder: Path) -> Loaded:
    (folder / "printed.toml").write_text(effective.render(loaded))
    return sources.load({"config": Given(str(folder / "printed.toml"), "--config")}, {})


def assert_same(loaded: Loaded, again: Loaded) -> None:
    assert dataclasses.replace(again.config, config=loaded.config.config) == loaded.config


@pytest.mark.parametrize("text", ["", TEXT], ids=["defaults", "two routes"])
def test_printed_settings_are_read_as_the_same(tmp_path, text):
    write(tmp_path, text)
    loaded = sources.load({"config": Given(str(tmp_path / "gmux.toml"), "--config")}, {})
    assert_same(loaded, printed_again(loaded, tmp_path))


COUNTS = st.integers(1, 9).map(str)
TIMES = st.sampled_from(["0", "1", "2s", "1.5", "500ms", "90s", "07"])
SIZES = st.sampled_from(["1", "64k", "16M", "007"])
NAMES = st.text("ab.-_0", min_size=1, max_size=4)
#: Values for kinds that are no choice, by what their errors call them; others have their own rules or need a file.
BY_METAVAR = {"N": COUNTS, "TIME": TIMES, "SIZE": SIZES, "NAME": NAMES, "DIR": st.just("/tmp")}
BY_SETTING = {
    "listen": st.sampled_from(["80", ":81", "[::1]:82", "unix:/tmp/a \x7f\U0001f600\"'\\"]),
    "target": st.sampled_from(["embedded", "bank:1", "unix:/b", "[::1]:83"]),
    "listen_mode": st.sampled_from(["0600", "660"]),
    "listen_owner": st.sampled_from(["root", "0:0", ":0"]),
    "user": st.sampled_from(["root", "0"]),
    "group": st.sampled_from(["root", "0"]),
    "umask": st.sampled_from(["022", "0", "27"]),
    "pid": st.text(min_size=1).filter(str.isprintable),
    "log_file": st.sampled_from(["-", "a.log", "ascii"]),
    "access_log": st.sampled_from(["-", "b.log"]),
    "set_header": st.lists(st.sampled_from(["A: b", "C:", 'D: "\\\t\xe4']), max_size=2),
    "key_fields": st.sampled_from([["11"], ["11,41", "0800:7"]]),
    "host": st.sampled_from(["a", "8", "a:8"]),
    "spec": st.sampled_from(["ascii", "binary"]),
    "on_connect": st.nothing(),
    "config": st.nothing(),
}


def values(name: str) -> st.SearchStrategy[str | list[str]]:
    setting = BY_NAME[name]
    if name in BY_SETTING:
        return BY_SETTING[name]
    if setting.kind.metavar in BY_METAVAR:
        return BY_METAVAR[setting.kind.metavar]
    return st.sampled_from(["true", "false"] if setting.kind is FLAG else setting.allowed[len("one of ") :].split(", "))


def some_of(names: list[str]) -> st.SearchStrategy[dict[str, str | list[str]]]:
    one = st.sampled_from([n for n in names if not values(n).is_empty]).flatmap(
        lambda name: st.tuples(st.just(name), values(name))
    )
    return st.lists(one, max_size=5).map(dict)


@given(some_of([s.name for s in SETTINGS]), some_of([s.name for s in OF_ROUTES]))
def test_any_printed_settings_are_read_as_the_same(tmp_path_factory, flags, variables):
    given_flags = {name: Given(text, BY_NAME[name].flag) for name, text in flags.items()}
    texts = {n: "\n".join(text) if isinstance(text, list) else text for n, text in variables.items()}
    environ = {BY_NAME[name].variable: text for name, text in texts.items()}
    try:
        loaded = sources.load(given_flags, environ)
    except ConfigErrors:
        assume(False)
    assert_same(loaded, printed_again(loaded, tmp_path_factory.getbasetemp()))


def test_print_to_an_output_of_another_encoding_is_told_in_one_line():
    done = run("check", "--print", "-p", "http", "--set-header", "A: \xe4", PYTHONIOENCODING="ascii")
    assert done.stderr == "gmux: cannot write to standard output: '\\xe4' is not in its encoding, ascii\n"
    assert done.returncode == 1


def test_printed_settings_are_toml_with_a_comment_behind_each_key():
    text = effective.render(sources.load({}, {}))
    assert set(tomllib.loads(text)) == {"service", "route"}
    lines = [line for line in text.splitlines() if line and not line.startswith("[")]
    assert lines
    assert all(re.fullmatch(r"[a-z-]+ = .+  # default", line) for line in lines)
