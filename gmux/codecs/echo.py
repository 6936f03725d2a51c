"""Lines that end in a line feed, each answered by a line: the echo service, and many instruments with text commands."""

from __future__ import annotations

from gmux.codecs._buffer import Buffer
from gmux.codecs.framed import FramedCodec
from gmux.errors import MessageTooLarge


class EchoCodec(FramedCodec):
    name = "echo"
    summary = "lines that end in \\n"

    def wrap(self, message: bytes) -> bytes:
        return message.removesuffix(b"\n") + b"\n"

    def cut(self, buffer: Buffer) -> bytes | None:
        line = buffer.take_through(b"\n")
        if len(buffer if line is None else line) > self.max_message:
            raise MessageTooLarge(f"a line is longer than {self.max_message} bytes (--max-message)")
        return line
