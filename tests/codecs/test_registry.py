"""Codecs are found by entry points: gmux's own, and those of packages that gmux has never heard of."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from gmux.codecs import registry
from gmux.codecs.base import Limits

OURS = {
    "echo": "gmux.codecs.echo:EchoCodec",
    "http": "gmux.codecs.http:HttpCodec",
    "iso8583": "gmux.codecs.iso8583:Iso8583Codec",
    "mpu": "gmux.codecs.iso8583:MpuCodec",
}

STAR_CODEC = """
from gmux.codecs.framed import FramedCodec


class StarCodec(FramedCodec):
    name = "star"
    summary = "messages that end in *"

    def cut(self, buffer):
        end = buffer.find(b"*") + 1
        return buffer.take(end) if end else None
"""


@pytest.fixture
def third_party(tmp_path):
    """The environment of a Python that has another package with a codec `star`, as pip would have installed it."""
    (tmp_path / "gmux_star.py").write_text(STAR_CODEC)
    info = tmp_path / "gmux_star-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gmux-star\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[gmux.codecs]\nstar = gmux_star:StarCodec\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


def run(environment: dict[str, str], *words: str, seconds: float = 20) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=seconds)


def test_entry_points_of_gmux_are_its_codecs():
    points = {p.name: p.value for p in entry_points(group=registry.GROUP) if p.dist.name == "gmux"}
    assert points == OURS


def test_names_are_sorted_and_hold_ours():
    names = registry.names()
    assert names == sorted(names)
    assert set(names) >= set(OURS)


@pytest.mark.parametrize("name", OURS)
def test_load_gives_a_codec_that_knows_its_name(name):
    kind = registry.load(name)
    assert kind.name == name
    assert kind.summary
    assert "\n" not in kind.summary
    codec = kind(Limits())
    assert codec.request_decoder().next_event() is None
    assert not codec.answer_decoder().has_surplus


def test_load_of_an_unknown_name_raises_key_error():
    with pytest.raises(KeyError):
        registry.load("gopher")


def test_codec_of_another_package_is_found_in_a_fresh_interpreter(third_party):
    code = "from gmux.codecs import registry; print(registry.load('star').summary)"
    assert run(third_party, "-c", code).stdout == "messages that end in *\n"


def test_codec_of_another_package_is_listed_by_gmux_list(third_party):
    lines = run(third_party, "-m", "gmux", "list").stdout.splitlines()
    assert lines[: len(OURS) + 1] == [f"* {name}" for name in sorted([*OURS, "star"])]


def test_codec_of_another_package_is_accepted_by_gmux_server(third_party):
    # An address that cannot be bound: everything before listening has passed, the protocol too.
    done = run(third_party, "-m", "gmux", "server", "-p", "star", "-l", "192.0.2.1:8000")
    assert done.returncode == 1
    assert done.stderr.startswith("gmux: cannot listen on 192.0.2.1:8000")


def test_codec_of_another_package_is_unknown_without_it():
    done = run(dict(os.environ), "-m", "gmux", "server", "-p", "star", "-l", "192.0.2.1:8000")
    assert done.returncode == 2
    assert "'star'" in done.stderr


@pytest.mark.parametrize(
    ("code", "reason"),
    [("import no_such_module", "no_such_module"), ("x = 1", "StarCodec"), ("1 / 0", "division by zero")],
    ids=["import", "class", "error"],
)
def test_codec_that_cannot_be_loaded_ends_gmux_server_with_one_line(third_party, tmp_path, code, reason):
    # Not a new worker after each that failed, for ever.
    (tmp_path / "gmux_star.py").write_text(code + "\n")
    done = run(third_party, "-m", "gmux", "server", "-p", "star", "-l", "127.0.0.1:0", seconds=60)
    assert done.returncode == 2
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_codec_without_a_sample_target_ends_gmux_server_for_embedded_with_one_line(third_party):
    done = run(third_party, "-m", "gmux", "server", "-p", "star", "-t", "embedded", "-l", "127.0.0.1:0", seconds=60)
    assert done.returncode == 2
    assert done.stderr.startswith("gmux: --target: 'embedded' is not allowed with --protocol star")
    assert len(done.stderr.splitlines()) == 1
