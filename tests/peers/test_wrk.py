"""wrk with 50 clients, each as fast as it can, through one connection to a real server."""

from __future__ import annotations

import re

import pytest
from gevent import subprocess

from tests.peers.exchanges import KEEPING
from tests.peers.support import url
from tests.support.programs import program
from tests.support.service import Server


@pytest.mark.parametrize("pair", KEEPING, indirect=True)
def test_wrk_with_50_clients_meets_no_error_and_nothing_is_worth_a_warning(pair):
    words = [program("wrk"), "--threads", "1", "--connections", "50", "--duration", "1s", "--timeout", "15s"]
    # At the target that is asked directly: the other one is to see the connection of its own gmux alone.
    with Server(pair.direct, protocol="http", pool_size="1") as server:
        done = subprocess.run([*words, f"{url(server.address)}/token/x"], capture_output=True, text=True, timeout=40)
    assert done.returncode == 0, done.stderr
    assert "Socket errors" not in done.stdout, done.stdout
    assert "Non-2xx" not in done.stdout, done.stdout
    served = re.search(r"(\d+) requests in", done.stdout)
    assert served and int(served[1]) >= 50, done.stdout
    assert not [line for line in server.log if not line.startswith("INFO")], server.log
