"""The dump of messages: what a line looks like, what is cut off, and that secrets stay out."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gmux.trace import MAX_DUMP, Trace, hexdump

LOG = logging.getLogger("gmux.test")


def stars(message: bytes) -> bytes:
    return b"*" * len(message)


def traced(caplog, data: bytes, redact=bytes, unsafe: bool = False) -> str:
    caplog.set_level(logging.DEBUG, LOG.name)
    caplog.clear()
    Trace(LOG, redact, unsafe).message("client 127.0.0.1:5000", "target", "upstream 1", data)
    [record] = caplog.records
    assert record.levelno == logging.DEBUG
    return record.getMessage()


def test_hexdump_shows_offset_bytes_and_text():
    assert list(hexdump(b"GET / HTTP/1.1\r\n\x00\xff~\x7f ")) == [
        "00000000  47 45 54 20 2f 20 48 54 54 50 2f 31 2e 31 0d 0a  |GET / HTTP/1.1..|",
        "00000010  00 ff 7e 7f 20                                   |..~. |",
    ]


def test_hexdump_of_nothing_is_nothing():
    assert list(hexdump(b"")) == []


@given(st.binary(max_size=200))
def test_hexdump_of_any_bytes_holds_all_of_them_and_no_control_characters(data):
    lines = list(hexdump(data))
    assert b"".join(bytes.fromhex(line[10:57]) for line in lines) == data
    # A terminal shows the log; a message must not be able to command it.
    assert all(line.isprintable() and line.isascii() for line in lines)


def test_message_is_logged_with_direction_connection_and_size(caplog):
    first, dump = traced(caplog, b"hello\n").split("\n")
    assert first == "client 127.0.0.1:5000 -> target (upstream 1) 6 bytes"
    assert dump.endswith("|hello.|")


def test_message_of_the_largest_dump_is_shown_whole(caplog):
    lines = traced(caplog, b"x" * MAX_DUMP).split("\n")
    assert len(lines) == 1 + MAX_DUMP // 16
    assert "more" not in lines[-1]


def test_message_above_the_largest_dump_is_cut_and_the_rest_counted(caplog):
    lines = traced(caplog, b"x" * (MAX_DUMP + 7)).split("\n")
    assert len(lines) == 1 + MAX_DUMP // 16 + 1
    assert lines[0].endswith(f" {MAX_DUMP + 7} bytes")
    assert lines[-1] == "... 7 bytes more"


def test_message_is_redacted_before_it_is_cut(caplog):
    # A codec finds what is secret in a whole message only.
    seen = []

    def redact(message: bytes) -> bytes:
        seen.append(len(message))
        return stars(message)

    text = traced(caplog, b"4000001234567899" * 500, redact)
    assert seen == [8000]
    assert "34 30 30 30" not in text
    assert "4000" not in text
    assert text.count("*") == MAX_DUMP


def test_unsafe_shows_what_would_be_redacted(caplog):
    text = traced(caplog, b"4000001234567899", lambda _: pytest.fail("redacted"), unsafe=True)
    assert "|4000001234567899|" in text
