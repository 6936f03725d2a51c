"""Programs of the system that tests use as peers, and processes that end with their test."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import pytest
from gevent import subprocess

from tests.support.service import ROOT


def program(name: str, package: str = "") -> str:
    """The path of a program.

    A fresh machine has none of them, and `make test` is to pass there; CI installs them, so there it is a failure.
    """
    # Debian puts servers where the search path of an ordinary user does not lead.
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")
    if found is None:
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"{name} is not installed: this test uses it as a peer; apt-get install {package or name}")
    return found


@contextmanager
def running(words: Sequence[str], variables: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """A process without input and output: TERM at the end, and KILL when that does not help."""
    process = subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | dict(variables or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
