"""What README and docs say is so: settings and their defaults, flags, commands, files, links, and the example codec."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import docopt
import pytest

from gmux import cli, effective, reference, sources
from gmux.codecs import registry
from gmux.codecs.base import Limits, Part, Request
from gmux.config import Given
from gmux.errors import BadAnswer, ConfigError, FramingError, MessageTooLarge, QueueTimeout
from gmux.settings import BY_FLAG, OF_SERVICE, SETTINGS, Setting
from tests.support.settings import read

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PROTOCOLS = ROOT / "docs" / "protocols.md"
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
CONFIGURATION = ROOT / "docs" / "configuration.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

#: Flags of tcp-multiplexer that the README translates, and those that are not settings.
OTHER_FLAGS = {"--delay", "--retryDelay", "--help", "--version", cli.PRINT, *cli.ALIASES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
WHOLE, CUT = b"\x02one\x03", b"\x02tw"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
each_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.flag)


def blocks(page: Path, language: str = "") -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def rows(page: Path) -> Iterator[list[str]]:
    for line in prose(page).splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def row_of(page: Path, setting: Setting) -> list[str]:
    """The one row of a table of settings, which is told from other tables by its header."""
    found = [row for row in rows(page) if setting.flag in SPAN.findall(row[0]) and len(row) == columns(page)]
    assert len(found) == 1, f"{setting.flag} has {len(found)} rows in {page.name}"
    return found[0]


def columns(page: Path) -> int:
    return next(len(row) for row in rows(page) if row[0] == "flag")


def default_of(setting: Setting) -> str:
    """What a table says in the column of the default."""
    if not setting.kind.metavar:
        return "off"  # also of a flag that turns off what is on
    if not setting.default:
        return "none"
    return "`50us`; `0` with one processor" if callable(setting.default) else f"`{setting.default}`"


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `gmux` of each command that a reader may type: in blocks behind `$`, in the text as a span."""
    typed = [line[2:] for block in blocks(page) for line in block.splitlines() if line.startswith("$ ")]
    for line in [*typed, *SPAN.findall(prose(page))]:
        program, *words = shlex.split(line) if line.startswith(("gmux ", ".venv/bin/gmux ")) else [""]
        if program:
            yield words


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# Settings.


@each_setting
def test_readme_names_the_setting_in_the_words_of_the_help(setting):
    flag, default, meaning = row_of(README, setting)
    assert flag == ", ".join(f"`{name}`" for name in (setting.short, setting.flag) if name)
    assert default == default_of(setting)
    assert meaning == setting.help


@each_setting
def test_settings_page_names_the_setting_with_its_key_variable_and_default(setting):
    flag, key, variable, default, allowed, about = row_of(SETTINGS_PAGE, setting)
    assert flag == ", ".join(f"`{name}`" for name in (setting.flag, setting.short) if name)
    assert key == ("" if setting.flag == "--config" else f"`{setting.key}`")
    assert variable == f"`{setting.variable}`"
    assert default == (default_of(setting) if setting.kind.metavar else f"`{setting.default}`")
    assert allowed
    assert [name for name in setting.protocols if f"`{name}`" not in about] == []


def test_settings_page_is_the_one_that_the_declarations_make():
    assert SETTINGS_PAGE.read_text() == reference.render(), "docs/settings.md is stale: run `make docs`"


def test_reference_has_a_text_for_each_setting():
    assert list(reference.ABOUT) == [setting.name for setting in SETTINGS]


def test_reference_is_the_same_on_each_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(registry, "names", lambda: ["echo", "stx"])
    assert SETTINGS_PAGE.read_text() == reference.render()


# The file.


def check(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gmux", "check", "--config", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def load(path: Path) -> sources.Loaded:
    return sources.load({"config": Given(str(path), "--config")}, {})


def test_example_file_is_right_and_printed_as_the_same(tmp_path):
    example_file = ROOT / "examples" / "gmux.toml"
    done = check(example_file)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the configuration is valid: 3 routes\n", "")
    loaded = load(example_file)
    printed = tmp_path / "printed.toml"
    printed.write_text(effective.render(loaded))
    assert load(printed).config.routes == loaded.config.routes
    assert {route.protocol for route in loaded.config.routes} == {"iso8583", "http", "echo"}


def test_file_of_the_configuration_page_is_right(tmp_path):
    (text,) = blocks(CONFIGURATION, "toml")
    file = tmp_path / "gmux.toml"
    file.write_text(text)
    assert [route.name for route in load(file).config.routes] == ["bank", "scale"]


def test_headings_of_the_settings_that_are_of_no_route_are_told():
    groups = {setting.group for setting in OF_SERVICE} - {"Configuration"}
    linked = {link.partition("#")[2] for link in LINK.findall(prose(CONFIGURATION)) if link.startswith("settings.md#")}
    assert linked == {slug(group) for group in groups}


def test_default_of_spin_is_the_one_the_pages_name():
    spin = BY_FLAG["--spin"]
    assert [s for s in SETTINGS if callable(s.default)] == [spin]
    assert spin.default_text == ("50us" if len(os.sched_getaffinity(0)) > 1 else "0")


@pytest.mark.parametrize("name", registry.names())
def test_protocol_of_gmux_is_in_the_tables(name):
    for page in (README, PROTOCOLS):
        assert any(f"`{name}`" in row[0] for row in rows(page)), page.name


# Flags, commands, files, links.


@each_page
def test_flags_that_the_page_mentions_exist(page):
    mentioned = {flag for span in SPAN.findall(prose(page)) for flag in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", span)}
    assert mentioned - set(BY_FLAG) - OTHER_FLAGS == set()


@each_page
def test_commands_that_the_page_shows_are_understood(page, monkeypatch):
    # The example codec is not installed here.
    monkeypatch.setattr(registry, "names", lambda: ["echo", "http", "iso8583", "mpu", "stx"])
    for words in commands(page):
        if "--help" in words:
            continue
        try:
            parsed = docopt.docopt(cli.help_text(), [cli._alias(word) for word in words], default_help=False)
        except docopt.DocoptExit:
            pytest.fail(f"gmux {' '.join(words)} is no command")
        given = {s.name: str(parsed[s.flag]).replace("True", "true") for s in SETTINGS if parsed[s.flag]}
        try:
            read(given)
        except ConfigError as error:
            pytest.fail(f"gmux {' '.join(words)}: {error}")


def test_commands_are_found():
    assert ["server", "-p", "echo", "-t", "127.0.0.1:1234", "-l", "8000"] in list(commands(README))
    assert ["list"] in list(commands(README))


@each_page
def test_targets_of_make_that_the_page_mentions_exist(page):
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"[`$] ?make ([a-z]+)", page.read_text())) <= known


@each_page
def test_files_that_the_page_names_exist(page):
    named = {
        span
        for span in SPAN.findall(prose(page))
        if re.fullmatch(r"(gmux|tests|loadtest|docs|examples)/[\w/]+\.(py|md)", span)
    }
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


@each_page
def test_relative_links_of_the_page_resolve(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(other), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, link


# The example codec.


@pytest.fixture
def project() -> dict:
    """What the example's pyproject.toml says."""
    (text,) = blocks(PROTOCOLS, "toml")
    return tomllib.loads(text)


@pytest.fixture
def installed(tmp_path, project) -> Path:
    """A folder with the example, as pip would have installed it."""
    (source,) = blocks(PROTOCOLS, "python")
    (module_name,) = project["tool"]["setuptools"]["py-modules"]
    (tmp_path / f"{module_name}.py").write_text(source)
    points = project["project"]["entry-points"][registry.GROUP]
    name, version = project["project"]["name"], project["project"]["version"]
    info = tmp_path / f"{module_name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "".join(f"{name} = {value}\n" for name, value in points.items())
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{lines}")
    return tmp_path


@pytest.fixture
def example(installed) -> ModuleType:
    (path,) = installed.glob("*.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def events(decoder, pieces) -> list[Request | Part]:
    found = []
    for piece in pieces:
        decoder.receive_data(piece)
        while (event := decoder.next_event()) is not None:
            found.append(event)
            assert len(found) < 100, "events without end"
    return found


@pytest.mark.parametrize("size", range(1, 14))
def test_example_codec_cuts_messages_whatever_the_reads(example, size):
    data = WHOLE + b"\x02\x03" + WHOLE
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    codec = example.StxCodec(Limits())
    requests = events(codec.request_decoder(), pieces)
    answers = events(codec.answer_decoder(), pieces)
    assert [r.data for r in requests] == [a.data for a in answers] == [WHOLE, b"\x02\x03", WHOLE]
    assert all(r.whole and not r.repeatable for r in requests)
    assert all(a.last and a.reusable for a in answers)


def test_example_codec_refuses_what_is_no_message(example):
    decoder = example.StxCodec(Limits()).request_decoder()
    with pytest.raises(FramingError, match="STX"):
        events(decoder, [WHOLE, b"x\x03"])


def test_example_codec_takes_a_bad_answer_for_a_bad_answer(example):
    with pytest.raises(BadAnswer, match="STX"):
        events(example.StxCodec(Limits()).answer_decoder(), [b"x"])


@pytest.mark.parametrize("end", [b"", b"\x03"], ids=["unfinished", "whole"])
def test_example_codec_keeps_to_the_limit(example, end):
    codec = example.StxCodec(Limits(max_message=5))
    assert len(events(codec.request_decoder(), [WHOLE])) == 1
    with pytest.raises(MessageTooLarge):
        events(codec.request_decoder(), [b"\x02four!" + end])


def test_example_codec_waits_for_the_rest_of_a_message(example):
    decoder = example.StxCodec(Limits()).request_decoder()
    assert events(decoder, [CUT]) == []
    assert len(decoder) == len(CUT)
    assert [r.data for r in events(decoder, [b"o\x03"])] == [CUT + b"o\x03"]


def test_example_codec_refusal_closes_unless_the_request_was_whole(example):
    codec = example.StxCodec(Limits())
    error = QueueTimeout("no upstream connection became free within 30 s")
    assert codec.refuse(error, None).close
    refusal = codec.refuse(error, Request(WHOLE))
    assert not refusal.close
    assert [a.data for a in events(codec.answer_decoder(), [refusal.data])] == [refusal.data]


def test_example_codec_is_listed_when_installed(installed, project):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    words = [sys.executable, "-m", "gmux", "list"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60)
    (name,) = project["project"]["entry-points"][registry.GROUP]
    assert f"* {name}" in done.stdout.splitlines()


def test_example_codec_names_itself_as_its_entry_point_does(example, project):
    ((name, value),) = project["project"]["entry-points"][registry.GROUP].items()
    module_name, _, class_name = value.partition(":")
    assert module_name == example.__name__
    assert getattr(example, class_name).name == name


@pytest.mark.parametrize("protocol", ["echo", "http", "iso8583", "mpu"])
def test_make_run_names_a_client_that_works(protocol):
    """What it tells to try is typed by a newcomer as it stands: the script and its words must exist."""
    done = subprocess.run(
        ["make", "--dry-run", "run", f"PROTO={protocol}", "PORT=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    said = re.search(r"Try in another terminal: ([^\"]+)\"", done.stdout)
    assert said
    words = said[1].split()
    if words[0].endswith("python"):
        answer = subprocess.run(
            [sys.executable, *words[1:]], cwd=ROOT, input="quit\n", capture_output=True, text=True, timeout=60
        )
        # No gmux listens: it must come as far as to find that out.
        assert "unknown" not in answer.stderr
        assert "127.0.0.1:1: Connection refused" in answer.stderr
