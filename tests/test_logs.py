"""The log's lines, as text and as JSON, and what `-v` and `-q` let through."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime

import pytest

from gmux import logs
from gmux.logs import LOGGER, DropTracebacks


@pytest.fixture(autouse=True)
def restore_logger():
    """The logger is one for the process; leave it as it was."""
    handlers, filters, level, propagate = LOGGER.handlers[:], LOGGER.filters[:], LOGGER.level, LOGGER.propagate
    yield
    LOGGER.handlers[:], LOGGER.filters[:], LOGGER.propagate = handlers, filters, propagate
    LOGGER.setLevel(level)


def fail() -> None:
    """Log an exception, as code that met one does."""
    try:
        raise ValueError("what went\nwrong")
    except ValueError:
        LOGGER.error("the pool failed", exc_info=True)


def test_text_line_is_level_time_and_message(capsys):
    logs.configure("text", verbose=False, quiet=False)
    LOGGER.info("listening on %s", "127.0.0.1:8000")
    captured = capsys.readouterr()
    assert captured.out == ""
    match = re.fullmatch(r"INFO\[(\S+)\] listening on 127\.0\.0\.1:8000\n", captured.err)
    assert match
    when = datetime.fromisoformat(match[1])
    assert when.tzinfo is not None
    assert abs((datetime.now().astimezone() - when).total_seconds()) < 60


@pytest.mark.parametrize(
    ("level", "short"), [("debug", "DEBU"), ("info", "INFO"), ("warning", "WARN"), ("error", "ERRO")]
)
def test_text_levels_have_four_letters(capsys, level, short):
    logs.configure("text", verbose=True, quiet=False)
    getattr(LOGGER, level)("x")
    assert capsys.readouterr().err.startswith(short + "[")


def test_json_is_one_object_a_line(capsys):
    logs.configure("json", verbose=True, quiet=False)
    LOGGER.warning('a "quoted" word')
    LOGGER.debug("two\nlines, \N{SNOWMAN}")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("warning", 'a "quoted" word')
    assert (second["level"], second["message"]) == ("debug", "two\nlines, \N{SNOWMAN}")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None


@pytest.mark.parametrize(
    ("verbose", "quiet", "shown"),
    [
        (False, False, ["info", "warning", "error"]),
        (True, False, ["debug", "info", "warning", "error"]),
        (False, True, ["warning", "error"]),
    ],
)
def test_levels_shown_follow_verbose_and_quiet(capsys, verbose, quiet, shown):
    logs.configure("json", verbose, quiet)
    for level in ("debug", "info", "warning", "error"):
        getattr(LOGGER, level)("x")
    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == shown


def test_configure_twice_logs_each_line_once(capsys):
    logs.configure("text", verbose=False, quiet=False)
    logs.configure("json", verbose=False, quiet=False)
    LOGGER.info("x")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_lines_do_not_reach_the_root_logger(caplog):
    logs.configure("text", verbose=False, quiet=False)
    LOGGER.info("x")
    assert caplog.records == []


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exception_becomes_a_part_of_its_line(capsys, log_format):
    logs.configure(log_format, verbose=False, quiet=False)
    LOGGER.addFilter(DropTracebacks())
    fail()
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    message = json.loads(text)["message"] if log_format == "json" else text
    assert r"the pool failed: ValueError('what went\nwrong')" in message
    assert "Traceback" not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_exception_with_verbose_has_its_traceback(capsys, log_format):
    logs.configure(log_format, verbose=True, quiet=False)
    LOGGER.addFilter(DropTracebacks())
    fail()
    text = capsys.readouterr().err
    message = json.loads(text)["message"] if log_format == "json" else text
    assert "the pool failed" in message
    assert "Traceback" in message
    assert "in fail" in message
    assert "ValueError: what went\nwrong" in message


def test_message_of_an_exception_may_hold_percent_signs(capsys):
    logs.configure("text", verbose=False, quiet=False)
    LOGGER.addFilter(DropTracebacks())
    try:
        raise ValueError("100 %s")
    except ValueError:
        logging.getLogger("gmux").error("%s", "50 %d", exc_info=True)
    assert "50 %d: ValueError('100 %s')" in capsys.readouterr().err
