"""--listen-mode, --listen-owner: who may connect to the Unix socket of --listen; and what they do not go with."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest
from gevent import subprocess

from tests.support.clients import Client
from tests.support.service import Server
from tests.support.target import Target

#: A user and group that those who run the tests are not.
OTHER = 65533


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "gmux.sock")


def answer_of(path: str) -> bytes:
    with Client(path) as client:
        return client.ask(b"hello")


def refusal(*words: str) -> tuple[int, str]:
    """The exit code, and the one line that is said."""
    done = subprocess.run([sys.executable, "-m", "gmux", "server", *words], capture_output=True, text=True)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.returncode, done.stderr


def test_listen_mode_not_given_lets_owner_and_group_connect(path):
    with Target() as target, Server(target, listen=f"unix:{path}"):
        assert stat.S_IMODE(os.lstat(path).st_mode) == 0o660
        assert answer_of(path) == b"hello"


@pytest.mark.parametrize("mode", ["0600", "666", "0777"])
def test_listen_mode_is_that_of_the_socket(path, mode):
    with Target() as target, Server(target, listen=f"unix:{path}", listen_mode=mode):
        assert stat.S_IMODE(os.lstat(path).st_mode) == int(mode, 8)
        assert answer_of(path) == b"hello"


def test_listen_mode_with_a_port_is_refused():
    code, said = refusal("-l", "127.0.0.1:0", "--listen-mode", "0600")
    assert (code, said) == (
        2,
        "gmux: --listen-mode: is not allowed with a port: it is for --listen unix:/PATH alone\n",
    )


def test_listen_owner_of_oneself_is_that_of_the_socket(path):
    own = f"{os.geteuid()}:{os.getegid()}"
    with Target() as target, Server(target, listen=f"unix:{path}", listen_owner=own):
        status = os.lstat(path)
        assert (status.st_uid, status.st_gid) == (os.geteuid(), os.getegid())
        assert answer_of(path) == b"hello"


@pytest.mark.parametrize(("owner", "uid", "gid"), [(f"{OTHER}:{OTHER}", OTHER, OTHER), (f"{OTHER}", OTHER, None)])
def test_listen_owner_another_is_for_root_alone(path, owner, uid, gid):
    words = ("-l", f"unix:{path}", "--listen-owner", owner)
    if os.geteuid():
        code, said = refusal(*words)
        reason = "cannot change its owner (--listen-owner): Operation not permitted"
        assert (code, said) == (1, f"gmux: cannot listen on unix:{path}: {reason}\n")
        assert not Path(path).exists()
        return
    with Target() as target, Server(target, *words, listen=""):
        status = os.lstat(path)
        assert (status.st_uid, status.st_gid) == (uid, os.getegid() if gid is None else gid)
        assert answer_of(path) == b"hello"


def test_listen_owner_with_a_port_is_refused():
    code, said = refusal("-l", "127.0.0.1:0", "--listen-owner", str(os.geteuid()))
    assert code == 2
    assert said == "gmux: --listen-owner: is not allowed with a port: it is for --listen unix:/PATH alone\n"
