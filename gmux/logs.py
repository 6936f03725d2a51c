"""The log: one line an event, as text in the form that users of tcp-multiplexer know, or as JSON."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime

LOGGER = logging.getLogger("gmux")


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")


def _message(record: logging.LogRecord) -> str:
    """The message, and the traceback that DropTracebacks left because of `-v`."""
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    return text


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname[:4]}[{_time(record)}] {_message(record)}"


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return json.dumps({"time": _time(record), "level": record.levelname.lower(), "message": _message(record)})


class DropTracebacks(logging.Filter):
    """An exception becomes a part of its line: no traceback is for an operator's eyes (unless `-v` asks for all)."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not LOGGER.isEnabledFor(logging.DEBUG):
            record.msg, record.args = f"{record.getMessage()}: {record.exc_info[1]!r}", ()
            record.exc_info = None
        return True


def configure(log_format: str, verbose: bool, quiet: bool) -> None:
    """Send the log to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)
