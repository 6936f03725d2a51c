"""The flag of the file of settings."""

from __future__ import annotations

from tests.support.clients import Client
from tests.support.service import Server
from tests.support.target import Target


def test_config_names_a_file_whose_settings_serve(tmp_path):
    file = tmp_path / "gmux.toml"
    file.write_text('[service]\nlog-format = "json"\n[[route]]\nname = "a"\nmax-message = 8\n')
    with Target() as target, Server(target, config=str(file)) as server:
        with Client(server.address) as client:
            assert client.ask(b"short") == b"short"
        with Client(server.address) as client:
            client.send(b"longer than 8 bytes")
            assert client.outcome(b"") == "closed"
    assert server.log[0].startswith('{"time": ')
