"""The log: one line an event, as text in the form that users of tcp-multiplexer know, for the journal, or as JSON."""

from __future__ import annotations

import json
import logging
import os
import traceback
from datetime import datetime
from typing import Any

from gmux.config import ServiceConfig
from gmux.errors import StartError, describe_fault
from gmux.logfile import LogFile

LOGGER = logging.getLogger("gmux")

#: Seconds to wait for the reader of a log before its file is closed: when a process ends, and in the master also when
#: it becomes a daemon or reloads. Nothing else waits for a reader.
PATIENCE = 0.5

#: What syslog(3) calls the levels.
PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}


def route_logger(name: str) -> logging.Logger:
    """The logger of a route: its lines tell its name, when it has one."""
    return LOGGER.getChild(name) if name else LOGGER


def access_file(config: ServiceConfig) -> LogFile:
    """The file of --access-log, not open yet."""
    return LogFile("access log", config.access_log, 1, _owner(config), LOGGER.warning)


def _owner(config: ServiceConfig) -> tuple[int, int]:
    return (-1 if config.user is None else config.user, -1 if config.group is None else config.group)


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")


def _route(record: logging.LogRecord) -> str:
    return record.name.partition(".")[2]


def _message(record: logging.LogRecord) -> str:
    """The message, and the traceback that DropTracebacks left because of `-v`."""
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + "".join(traceback.format_exception(*record.exc_info)).rstrip()
    return text


def _text(record: logging.LogRecord) -> str:
    route = _route(record)
    return f"{route}: {_message(record)}" if route else _message(record)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname[:4]}[{_time(record)}] {_text(record)}"


class JournalFormatter(logging.Formatter):
    """The level as in sd-daemon(3), on each line, because each is an entry of its own. The journal knows the time."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{PRIORITIES.get(record.levelno, 6)}>"
        return prefix + _text(record).replace("\n", "\n" + prefix)


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": _time(record), "level": record.levelname.lower()}
        if route := _route(record):
            fields["route"] = route
        return json.dumps(fields | {"message": _message(record)})


class DropTracebacks(logging.Filter):
    """An exception becomes a part of its line: no traceback is for an operator's eyes (unless `-v` asks for all)."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and not LOGGER.isEnabledFor(logging.DEBUG):
            record.msg, record.args = f"{record.getMessage()}: {describe_fault(record.exc_info[1])}", ()
            record.exc_info = None
        return True


class LogHandler(logging.Handler):
    def __init__(self, file: LogFile) -> None:
        super().__init__()
        self._file = file
        # Here and not at the logger, whose filters do not see what comes from the loggers of routes.
        self.addFilter(DropTracebacks())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
        except Exception:  # a message and arguments that do not fit
            self.handleError(record)
        else:
            self._file.write(line.encode(errors="backslashreplace"))


#: For what is wrong with the log itself.
_standard_error = LogFile("standard error", "", 2, (-1, -1), lambda text: None)

#: What this process writes, or has made for its workers.
_files: list[LogFile] = []


def configure(config: ServiceConfig) -> None:
    """Send the log where the settings say, from now on. Raises StartError, and then nothing has changed."""
    file = LogFile("log file", config.log_file, 2, _owner(config), _complain)
    files = [file]
    if config.access_log:
        # Workers write it. But a wrong name is to end the start, and they may not be allowed to make a file there.
        files.append(access_file(config))
    try:
        for each in (*files, _standard_error):
            each.open()
    except StartError:
        file.close()
        raise
    handler = LogHandler(file)
    if config.log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(JournalFormatter() if not file.is_named and _is_journal() else TextFormatter())
    LOGGER.handlers[:] = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel("DEBUG" if config.verbose else "WARNING" if config.quiet else config.log_level.upper())
    flush()
    for each in _files:
        each.close()
    _files[:] = files


def reopen() -> None:
    """Open the files of this process again, because logrotate has moved them. Never raises."""
    for file in (*_files, _standard_error):
        file.reopen()


def retry_in(loop: Any) -> None:
    """In a new worker: from now on write from timers of `loop` what a file did not take."""
    for file in (*_files, _standard_error):
        file.retry_in(loop)


def retry() -> None:
    """Write what a file did not take, as far as it takes it now. The master calls it in each turn."""
    for file in (*_files, _standard_error):
        file.retry()


def flush() -> None:
    """Write what the files did not take, and wait up to PATIENCE for each."""
    for file in (*_files, _standard_error):
        file.flush(PATIENCE)


def _complain(text: str) -> None:
    """Say in the log, and on standard error, that there is something wrong with the log."""
    LOGGER.warning(text)
    if _files and _files[0].is_named:
        _standard_error.write(f"gmux: {text}\n".encode(errors="backslashreplace"))


def _is_journal() -> bool:
    """Whether standard error is the systemd journal (systemd.exec(5))."""
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
