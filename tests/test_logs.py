"""The log's lines, as text, for the journal and as JSON; what is let through; and where they go."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from datetime import datetime
from time import monotonic

import gevent
import pytest

from gmux import logs
from gmux.errors import StartError
from gmux.logfile import MAX_HELD, LogFile
from gmux.logs import LOGGER
from tests.support.settings import read
from tests.support.wait import wait_until

NOBODY = 65534


@pytest.fixture(autouse=True)
def restore_logger():
    """The logger is one for the process; leave it as it was."""
    handlers, filters, level, propagate = LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate
    yield
    configure()  # closes the files
    LOGGER.handlers[:], LOGGER.filters[:], LOGGER.propagate = handlers, filters, propagate
    LOGGER.setLevel(level)


def configure(**settings: str) -> None:
    logs.configure(read(settings))


def fail() -> None:
    """Log an exception, as code that met one does."""
    try:
        raise ValueError("what went\nwrong")
    except ValueError:
        LOGGER.error("the pool failed", exc_info=True)


# Lines.


def test_text_line_is_level_time_and_message(capfd):
    configure()
    LOGGER.info("listening on %s", "127.0.0.1:8000")
    captured = capfd.readouterr()
    assert captured.out == ""
    match = re.fullmatch(r"INFO\[(\S+)\] listening on 127\.0\.0\.1:8000\n", captured.err)
    assert match
    when = datetime.fromisoformat(match[1])
    assert when.tzinfo is not None
    assert abs((datetime.now().astimezone() - when).total_seconds()) < 60


@pytest.mark.parametrize(
    ("level", "short"), [("debug", "DEBU"), ("info", "INFO"), ("warning", "WARN"), ("error", "ERRO")]
)
def test_text_levels_have_four_letters(capfd, level, short):
    configure(verbose="true")
    getattr(LOGGER, level)("x")
    assert capfd.readouterr().err.startswith(short + "[")


def test_json_is_one_object_a_line(capfd):
    configure(log_format="json", verbose="true")
    LOGGER.warning('a "quoted" word')
    LOGGER.debug("two\nlines, \N{SNOWMAN}")
    first, second = map(json.loads, capfd.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("warning", 'a "quoted" word')
    assert (second["level"], second["message"]) == ("debug", "two\nlines, \N{SNOWMAN}")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert list(first) == ["time", "level", "message"]


def test_logger_of_a_route_without_a_name_is_that_of_the_service():
    assert logs.route_logger("") is LOGGER


def test_lines_of_a_route_begin_with_its_name(capfd):
    configure()
    logs.route_logger("atm.north").info("x")
    assert capfd.readouterr().err.endswith("] atm.north: x\n")


def test_json_of_a_route_has_its_name(capfd):
    configure(log_format="json")
    logs.route_logger("atm.north").info("x")
    line = json.loads(capfd.readouterr().err)
    assert (line["route"], line["message"]) == ("atm.north", "x")


def test_message_that_is_no_unicode_is_logged_all_the_same(capfd):
    configure()
    LOGGER.info("%s", os.fsdecode(b"/tmp/\xff"))
    assert capfd.readouterr().err.endswith("/tmp/\\udcff\n")


# The journal.


def test_journal_gets_priorities_and_no_time(capfd, monkeypatch):
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    configure(verbose="true")
    LOGGER.debug("dump\n00 01\n02")
    LOGGER.info("x")
    logs.route_logger("a").warning("y")
    LOGGER.error("z")
    LOGGER.critical("end")
    assert capfd.readouterr().err.splitlines() == [
        *("<7>dump", "<7>00 01", "<7>02"),
        *("<6>x", "<4>a: y", "<3>z", "<2>end"),
    ]


def test_journal_gets_json_as_it_is(capfd, monkeypatch):
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    configure(log_format="json")
    LOGGER.info("x")
    assert json.loads(capfd.readouterr().err)["message"] == "x"


def test_journal_of_somebody_else_changes_nothing(capfd, monkeypatch):
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    configure()
    LOGGER.info("x")
    assert capfd.readouterr().err.startswith("INFO[")


def test_journal_at_standard_error_changes_nothing_in_a_file(tmp_path, monkeypatch):
    status = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    configure(log_file=f"{tmp_path}/log")
    LOGGER.info("x")
    assert (tmp_path / "log").read_text().startswith("INFO[")


# Levels.


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, ["info", "warning", "error"]),
        ({"verbose": "true"}, ["debug", "info", "warning", "error"]),
        ({"quiet": "true"}, ["warning", "error"]),
        ({"log_level": "debug"}, ["debug", "info", "warning", "error"]),
        ({"log_level": "warning"}, ["warning", "error"]),
        ({"log_level": "error"}, ["error"]),
    ],
)
def test_levels_shown_follow_the_settings(capfd, settings, shown):
    configure(log_format="json", **settings)
    for level in ("debug", "info", "warning", "error"):
        getattr(LOGGER, level)("x")
    assert [json.loads(line)["level"] for line in capfd.readouterr().err.splitlines()] == shown


def test_configure_twice_logs_each_line_once(capfd):
    configure()
    configure(log_format="json")
    LOGGER.info("x")
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_lines_do_not_reach_the_root_logger(caplog):
    configure()
    LOGGER.info("x")
    assert caplog.records == []


# Exceptions.


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exception_becomes_a_part_of_its_line(capfd, log_format):
    configure(log_format=log_format)
    fail()
    text = capfd.readouterr().err
    assert len(text.splitlines()) == 1
    message = json.loads(text)["message"] if log_format == "json" else text
    assert r"the pool failed: ValueError('what went\nwrong')" in message
    assert "Traceback" not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exception_with_verbose_has_its_traceback(capfd, log_format):
    configure(log_format=log_format, verbose="true")
    fail()
    text = capfd.readouterr().err
    message = json.loads(text)["message"] if log_format == "json" else text
    assert "the pool failed" in message
    assert "Traceback" in message
    assert "in fail" in message
    assert "ValueError: what went\nwrong" in message


def test_exception_of_a_route_becomes_a_part_of_its_line(capfd):
    configure()
    try:
        raise ValueError("wrong")
    except ValueError:
        logs.route_logger("a").exception("failed")
    assert re.search(r"\] a: failed: ValueError\('wrong'\) in .*test_logs.py, line [0-9]+\n$", capfd.readouterr().err)


def test_message_of_an_exception_may_hold_percent_signs(capfd):
    configure()
    try:
        raise ValueError("100 %s")
    except ValueError:
        logging.getLogger("gmux").error("%s", "50 %d", exc_info=True)
    assert "50 %d: ValueError('100 %s')" in capfd.readouterr().err


# Files.


@pytest.mark.parametrize("name", ["", "-"])
def test_file_without_a_name_is_standard_error(capfd, name):
    configure(log_file=name) if name else configure()
    LOGGER.info("x")
    assert capfd.readouterr().err.endswith("] x\n")


def test_file_is_appended_to_and_others_cannot_read_it(tmp_path, capfd):
    log = tmp_path / "log"
    log.write_text("before\n")
    configure(log_file=str(log))
    LOGGER.info("x")
    assert log.read_text().startswith("before\nINFO[")
    assert capfd.readouterr().err == ""
    configure(log_file=f"{tmp_path}/new")
    assert (tmp_path / "new").stat().st_mode & 0o7 == 0


@pytest.mark.parametrize("setting", ["log_file", "access_log"])
def test_file_that_cannot_be_opened_is_an_error_and_changes_nothing(tmp_path, setting):
    configure(log_file=f"{tmp_path}/log")
    what = setting.replace("_", " ")
    with pytest.raises(StartError, match=rf"^cannot open the {what} {tmp_path}/no/x: No such file or directory$"):
        configure(**{setting: f"{tmp_path}/no/x"})
    LOGGER.info("x")
    assert (tmp_path / "log").read_text().endswith("] x\n")


def test_reopen_writes_to_a_new_file_of_the_name(tmp_path):
    log = tmp_path / "log"
    configure(log_file=str(log))
    LOGGER.info("first")
    log.rename(tmp_path / "log.1")
    LOGGER.info("second")
    logs.reopen()
    LOGGER.info("third")
    assert [line[-5:] for line in (tmp_path / "log.1").read_text().splitlines()] == ["first", "econd"]
    assert log.read_text().endswith("] third\n")


def test_reopen_of_a_relative_name_does_not_follow_the_folder_of_the_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configure(log_file="log")
    (tmp_path / "log").unlink()
    monkeypatch.chdir("/")
    logs.reopen()
    assert (tmp_path / "log").exists()


def test_reopen_that_fails_goes_on_with_the_old_file_and_says_so(tmp_path, capfd):
    folder = tmp_path / "folder"
    folder.mkdir()
    configure(log_file=f"{folder}/log")
    folder.rename(tmp_path / "moved")
    logs.reopen()
    LOGGER.info("x")
    text = f"cannot open the log file {folder}/log: No such file or directory"
    first, second = (tmp_path / "moved" / "log").read_text().splitlines()
    assert first.startswith("WARN[")
    assert first.endswith(text)
    assert second.endswith("] x")
    assert capfd.readouterr().err == f"gmux: {text}\n"


def test_reopen_leaves_no_descriptor_behind(tmp_path):
    configure(log_file=f"{tmp_path}/log")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        logs.reopen()
        configure(log_file=f"{tmp_path}/log")
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_file_of_a_service_with_a_user_is_given_to_it(tmp_path):
    names = [tmp_path / "log", tmp_path / "access"]
    configure(log_file=str(names[0]), access_log=str(names[1]), user=str(NOBODY), group=str(NOBODY))
    assert {(name.stat().st_uid, name.stat().st_gid) for name in names} == {(NOBODY, NOBODY)}
    for name in names:
        name.unlink()
    logs.reopen()
    assert {(name.stat().st_uid, name.stat().st_gid) for name in names} == {(NOBODY, NOBODY)}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_link_that_a_user_put_there_gives_no_file_away(tmp_path):
    theirs = tmp_path / "shadow"
    theirs.touch()
    (tmp_path / "log").symlink_to(theirs)
    with pytest.raises(StartError):
        configure(log_file=f"{tmp_path}/log", user=str(NOBODY))
    assert theirs.stat().st_uid == 0


def test_lines_of_several_processes_do_not_mix(tmp_path):
    configure(log_file=f"{tmp_path}/log")
    pids = []
    for letter in "abcd":
        pid = os.fork()
        if not pid:
            for _ in range(200):
                LOGGER.info(letter * 5000)
            os._exit(0)
        pids.append(pid)
    for pid in pids:
        os.waitpid(pid, 0)
    messages = [line.partition("] ")[2] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(messages) == [letter * 5000 for letter in "abcd" for _ in range(200)]


# What goes wrong with files.


class Pipe:
    """A file under test that writes to a pipe, which it shares with others, and what it complains of."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.said: list[str] = []
        self.file = self.share()

    def share(self) -> LogFile:
        """Another file that writes to it, as that of another worker does."""
        file = LogFile("log file", "", self.writer, (-1, -1), self.said.append)
        file.open()
        return file

    def read(self) -> bytes:
        """What has come, and what comes when the file is written again."""
        got = b""
        while True:
            try:
                got += os.read(self.reader, 1 << 20)
            except BlockingIOError:
                if not self.file._held:
                    return got
                self.file.retry()


class SocketPair(Pipe):
    """The same with a socket, such as that of the systemd journal."""

    def __init__(self) -> None:
        super().__init__()
        self._pair = socket.socketpair()
        self.reader, self.writer = (sock.fileno() for sock in self._pair)
        os.set_blocking(self.reader, False)
        self.file = self.share()


class PipeOfAnother(Pipe):
    """The same with a pipe of another user, that nobody else can open again."""

    def share(self) -> LogFile:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", self._refuse)
            return super().share()

    @staticmethod
    def _refuse(*args: object) -> int:
        raise PermissionError


each_pipe = pytest.mark.parametrize("kind", [Pipe, SocketPair, PipeOfAnother])


@each_pipe
def test_reader_that_stops_makes_nobody_wait_and_costs_no_line(kind):
    pipe = kind()
    lines = [b"%06d" % number + b"." * 993 + b"\n" for number in range(700)]
    begin = monotonic()
    for line in lines:
        pipe.file.write(line)
    assert monotonic() - begin < 1
    assert pipe.file._held
    assert pipe.read() == b"".join(lines)
    assert pipe.said == []


@each_pipe
def test_descriptor_that_others_share_blocks_as_before(kind):
    pipe = kind()
    pipe.file.write(b"x\n")
    assert os.get_blocking(pipe.writer)


@pytest.mark.parametrize("kind", [Pipe, SocketPair])
def test_last_room_that_another_process_takes_makes_nobody_wait(kind):
    """Two that ask whether there is room, and then write, would both believe it."""
    pipe = kind()
    other = pipe.share()
    while not pipe.file._held:
        pipe.file.write(b"." * 4095 + b"\n")
    begin = monotonic()
    other.write(b"x\n")
    assert other._held
    assert monotonic() - begin < 1


def test_lines_of_two_that_share_a_slow_reader_do_not_mix():
    pipe = Pipe()
    other = pipe.share()
    for number in range(300):
        pipe.file.write(b"a%0999d\n" % number)
        other.write(b"b%0499d\n" % number)
    got = b""
    while pipe.file._held or other._held:
        got += os.read(pipe.reader, 4096)
        pipe.file.retry()
        other.retry()
    got += pipe.read()
    assert sorted(got.splitlines()) == [b"a%0999d" % n for n in range(300)] + [b"b%0499d" % n for n in range(300)]


def test_reader_that_stops_for_long_costs_lines_which_are_counted():
    pipe = Pipe()
    line = b"." * 9999 + b"\n"
    for _ in range(200):
        pipe.file.write(line)
    got = pipe.read()
    kept = len(got) // len(line)
    assert got == line * kept
    assert MAX_HELD <= len(got) < 200 * len(line)
    assert pipe.said == ["cannot write the log file: nobody reads it", f"{200 - kept} lines for the log file are lost"]


def test_lines_that_are_lost_are_one_gap_until_there_is_room_for_many():
    pipe = Pipe()
    for _ in range(300):
        pipe.file.write(b"." * 9999 + b"\n")
        with suppress(BlockingIOError):
            os.read(pipe.reader, 4096)
    pipe.read()
    assert len(pipe.said) == 2
    pipe.file.write(b"x\n")
    assert pipe.read() == b"x\n"


def test_flush_waits_for_a_reader_that_is_on_its_way_and_no_longer_than_it_is_told():
    pipe = Pipe()
    pipe.file.write(b"." * 500_000 + b"\n")
    begin = monotonic()
    pipe.file.flush(0.1)
    assert 0.1 <= monotonic() - begin < 1
    got = bytearray()
    reading = threading.Thread(target=lambda: read_to(b"\n", pipe.reader, got))
    reading.start()
    pipe.file.flush(20)
    assert not pipe.file._held
    reading.join()
    assert len(got) == 500_001


def read_to(end: bytes, descriptor: int, got: bytearray) -> None:
    os.set_blocking(descriptor, True)
    while not got.endswith(end):
        got += os.read(descriptor, 4096)


def test_loop_writes_what_is_held_as_soon_as_it_is_read():
    pipe = Pipe()
    pipe.file.retry_in(gevent.get_hub().loop)
    pipe.file.write(b"." * 200_000 + b"\n")
    assert pipe.file._held
    got = bytearray()

    def take() -> bool:
        with suppress(BlockingIOError):
            got.extend(os.read(pipe.reader, 1 << 20))
        return got.endswith(b"\n")

    wait_until(take)
    assert len(got) == 200_001


def test_closing_says_what_is_lost():
    pipe = Pipe()
    for _ in range(100):
        pipe.file.write(b"." * 4095 + b"\n")
    pipe.file.close()
    (said,) = pipe.said
    assert re.fullmatch("[0-9]{2} lines for the log file are lost", said)


def test_reader_that_is_gone_disturbs_nobody():
    pipe = Pipe()
    os.close(pipe.reader)
    for _ in range(3):
        pipe.file.write(b"x\n")
    pipe.file.flush(20)
    assert pipe.said == ["cannot write the log file: Broken pipe"]


def test_disk_that_is_full_and_then_is_not_costs_no_line(tmp_path, capfd):
    log = tmp_path / "log"
    log.write_text("." * 10_000 + "\n")
    configure(log_file=str(log))
    # The largest size of a file stands in for the disk; there is room for what goes to standard error.
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_100, usual[1]))
    try:
        for number in range(5):
            LOGGER.info("line %d of forty letters and some more", number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    assert capfd.readouterr().err == f"gmux: cannot write the log file {log}: File too large\n"
    LOGGER.info("after")
    lines = log.read_text().splitlines()[1:]
    assert all(re.fullmatch(r"(INFO|WARN)\[\S+\] .*", line) for line in lines)
    told = [line for line in lines if line.startswith("INFO")]
    assert [line.partition("] ")[2][:6] for line in told] == [*(f"line {number}" for number in range(5)), "after"]
    assert len(lines) == len(told) + 1


def test_standard_error_that_is_closed_gives_its_number_to_no_connection():
    code = (
        "import socket; from gmux import logs; from tests.support.settings import read; logs.configure(read({}));"
        "logs.LOGGER.info('x'); print(socket.socket().fileno())"
    )
    command = f'exec "{sys.executable}" -c "{code}" 2>&-'
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True, timeout=60)
    assert int(done.stdout) > 2
