"""`gmux` as its user meets it: a process, its output and its exit code."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys

import pytest

import gmux
from gmux.codecs import registry
from gmux.settings import SETTINGS

#: No machine has this address (RFC 5737), so a server that got as far as listening says so and ends.
NOWHERE = "192.0.2.1:8000"
CANNOT_LISTEN = f"gmux: cannot listen on {NOWHERE}: Cannot assign requested address\n"


#: A resolver that nobody answers, as in a sandbox, gives up soon: its own patience is longer than ours.
HASTY = os.environ | {"RES_OPTIONS": "timeout:1 attempts:1"}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gmux", *words]
    return subprocess.run(command, env=HASTY, capture_output=True, text=True, timeout=60)


def usage_error(*words: str) -> str:
    """The one line that `gmux` says about wrong words."""
    done = run(*words)
    assert done.stderr.startswith("gmux: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.endswith("\n")
    assert done.stdout == ""
    assert done.returncode == 2
    return done.stderr


def assert_accepted(*words: str) -> None:
    """The words are a server's, all of them: it fails at its address and not before."""
    done = run("server", "-l", NOWHERE, *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", CANNOT_LISTEN)


# Words that tell something.


def test_list_prints_each_protocol_on_its_line():
    done = run("list")
    lines = done.stdout.splitlines()
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line for line in lines if line.startswith("* ")] == [f"* {name}" for name in registry.names()]
    assert "gmux server -p echo" in lines[-1]


@pytest.mark.parametrize("word", ["version", "--version"])
def test_version_prints_name_and_version(word):
    done = run(word)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"gmux {gmux.__version__}\n", "")


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_the_commands(words):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    for command in ("gmux server [options]", "gmux check [--print] [options]", "gmux list", "gmux version"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "words", [["server", "--help"], ["server", "-h"], ["server", "-p", "mpu", "--help"], ["check", "-h"]]
)
def test_server_help_has_each_flag_with_its_default(words):
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    for setting in SETTINGS:
        names = f"{setting.short}, {setting.flag}" if setting.short else setting.flag
        line = re.search(rf"^ +{re.escape(names)}\b.*$", done.stdout, re.MULTILINE)
        assert line, setting.flag
        assert setting.help in line[0]
        if setting.kind.metavar:
            assert f"{setting.flag} {setting.kind.metavar} " in line[0]
            default = f" (default {setting.default_text})" if setting.default_text else ""
            assert line[0].endswith(setting.help + default)
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_installed_command_is_the_module():
    command = os.path.join(os.path.dirname(sys.executable), "gmux")
    done = subprocess.run([command, "version"], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"gmux {gmux.__version__}\n"


# Words that are wrong: exit code 2, one line, no traceback.

WRONG = [
    ([], "a command is missing: server, check, list or version"),
    (["-p", "echo"], "a command is missing"),
    (["serve"], "unexpected word 'serve' (did you mean server?)"),
    (["frobnicate"], "unexpected word 'frobnicate'; see gmux --help"),
    (["server", "list"], "unexpected word 'list'; see gmux --help"),
    (["server", "8000"], "unexpected word '8000'"),
    (["server", "a\nb"], r"unexpected word 'a\nb'"),
    (["list", "-v"], "--verbose is not for gmux list"),
    (["list", "--pool-size", "2"], "--pool-size is not for gmux list"),
    (["version", "--quiet"], "--quiet is not for gmux version"),
    (["server", "--pool-sise", "2"], "unknown option --pool-sise (did you mean --pool-size?)"),
    (["server", "--pool-sise=2"], "unknown option --pool-sise (did you mean --pool-size?)"),
    (["server", "--zzz"], "unknown option --zzz; see gmux server --help"),
    (["server", "-x"], "unknown option -x"),
    (["server", "-"], "unknown option -"),
    (["server", "--pool-size"], "--pool-size needs a value: a whole number from 1 to 1000"),
    (["server", "-p"], "--protocol needs a value: one of echo"),
    (["server", "--pool-size", "2", "--pool-size", "2"], "--pool-size is given twice"),
    (["server", "-t", "a:1", "--target=b:2"], "--target is given twice"),
    (["server", "-t", "a:1", "--targetServer", "b:2"], "--target is given twice"),
    (["server", "-v", "--verbose"], "--verbose is given twice"),
    (["server", "--verbose=true"], "--verbose takes no value"),
    (["server", "-p", "mpuu"], "--protocol: 'mpuu' is not allowed: did you mean mpu? one of echo, "),
    (["server", "--pool-size", "none"], "--pool-size: 'none' is not allowed: a whole number from 1 to 1000"),
    (["server", "--timeout", "-5"], "--timeout: '-5' is not allowed: a time such as"),
    (["server", "-l", "::1:80"], "--listen: '::1:80' is not allowed: PORT, HOST:PORT or [IPV6]:PORT"),
    (["server", "-t", "1234"], "--target: '1234' is not allowed: HOST:PORT"),
    (["server", "-p=echo"], "--protocol: '=echo' is not allowed"),
    (["server", "-v", "-q"], "--quiet: is not allowed together with --verbose"),
    # Short flags stand alone.
    (["server", "-vq"], "--verbose takes no value"),
    (["server", "-vv"], "--verbose takes no value"),
    (["server", "--pool-min", "2"], "--pool-min: '2' is not allowed: at most --pool-size, which is 1"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    WRONG,
    ids=lambda p: " ".join(p).encode("unicode_escape").decode() if isinstance(p, list) else "",
)
def test_wrong_words_are_told_in_one_line(words, message):
    assert message in usage_error(*words)


def test_unknown_option_with_a_line_feed_is_told_in_one_line():
    assert "unknown option" in usage_error("server", "--a\nb")


@pytest.mark.parametrize(
    "words", [["list", "--version"], ["--version", "list"], ["server", "--version"], ["--version", "--version"]]
)
def test_version_flag_beside_another_command_is_told_in_one_line(words):
    message = usage_error(*words)
    assert "unexpected word" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("words", [["--pool-size="], ["--pool-size", ""], ["-t", ""], ["--log-format="]])
def test_empty_value_is_refused_and_no_default(words):
    assert "'' is not allowed" in usage_error("server", "-l", NOWHERE, *words)


# Abbreviations are refused: a setting added later would change what one means, and `--uns` would show card data.


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["server", "-l", NOWHERE, "--queue-l", "5"], "--queue-l"),
        (["server", "-l", NOWHERE, "--queue-l=5"], "--queue-l"),
        (["server", "-l", NOWHERE, "--queue", "5"], "--queue"),
        (["server", "-l", NOWHERE, "--uns"], "--uns"),
        (["server", "-l", NOWHERE, "--verb"], "--verb"),
        (["--hel"], "--hel"),
        (["--vers"], "--vers"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_abbreviated_flag_is_an_unknown_option(words, flag):
    assert f"unknown option {flag}" in usage_error(*words)


# Words that are right.


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-pecho"],
        ["-p", "mpu"],
        ["--protocol=mpu"],
        ["-tlocalhost:1"],
        ["-q", "-pmpu"],
        ["--applicationProtocol=iso8583"],
        ["--applicationProtocol", "iso8583"],
        ["--targetServer=localhost:1"],
        ["--targetServer", "localhost:1"],
        ["--queue-limit", "5", "--queue-timeout=5s", "--spin", "0"],
        ["--pool-size", "4", "--pool-min", "2", "--upstream-idle-timeout", "1m"],
        ["--log-format", "json"],
        ["--unsafe-dump"],
    ],
    ids=" ".join,
)
def test_right_words_are_accepted(words):
    assert_accepted(*words)


def test_options_may_stand_before_the_command():
    done = run("-l", NOWHERE, "server")
    assert (done.returncode, done.stderr) == (1, CANNOT_LISTEN)


def test_values_of_the_old_long_names_are_checked():
    assert "'gopher' is not allowed" in usage_error("server", "--applicationProtocol=gopher")
    assert "'1234' is not allowed" in usage_error("server", "--targetServer", "1234")


# The service cannot start: exit code 1, one line.


def test_port_in_use_is_told_in_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run("server", "-l", address)
    assert done.returncode == 1
    assert done.stderr == f"gmux: cannot listen on {address}: Address already in use\n"


def test_host_that_does_not_exist_is_told_in_one_line():
    # "invalid" never resolves (RFC 6761).
    done = run("server", "-l", "nowhere.invalid:8000")
    assert done.returncode == 1
    assert done.stderr.startswith("gmux: cannot listen on nowhere.invalid:8000: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("old", "flag"), [("--delay", "--connect-delay"), ("--retryDelay", "--retry-delay")])
@pytest.mark.parametrize("form", ["{}=never", "{} never"])
def test_old_name_of_a_delay_is_the_flag_of_today(old, flag, form):
    done = run("server", *form.format(old).split())
    assert done.returncode == 2
    assert done.stderr.startswith(f"gmux: {flag}: 'never' is not allowed")
