"""ISO 8583 messages behind a length header: `iso8583` (2 bytes, big-endian) and `mpu` (4 ASCII digits).

Only the header is read for framing; it counts the message and not itself. A length of zero is a keepalive poll, as
jPOS channels send: it belongs to the hop, so it is dropped and never forwarded.
"""

from __future__ import annotations

from gmux.codecs import _card_data
from gmux.codecs._buffer import Buffer
from gmux.codecs.framed import FramedCodec
from gmux.errors import FramingError, MessageTooLarge


class LengthHeaderCodec(FramedCodec):
    """Base of the codecs with a length header of `header_size` bytes, read by `length`."""

    header_size: int
    poll: bytes

    def length(self, header: bytes) -> int:
        """The bytes of the message after `header`. Raises FramingError."""
        raise NotImplementedError

    def cut(self, buffer: Buffer) -> bytes | None:
        size = self.header_size
        while len(buffer) >= size:
            length = self.length(buffer.peek(size))
            if not length:
                self.skip(buffer)
            elif length > self.max_message:
                raise MessageTooLarge(f"a message of {length} bytes is longer than {self.max_message} (--max-message)")
            elif len(buffer) < size + length:
                return None
            else:
                return buffer.take(size + length)
        return None

    def skip(self, buffer: Buffer) -> None:
        size = self.header_size
        if buffer.peek(size) == self.poll:
            # All at once: one after the other, a read full of them would cost more than a thousand messages.
            held = buffer.peek(len(buffer))
            zeros = len(held) - len(held.lstrip(self.poll[:1]))
            buffer.take(zeros - zeros % size)

    def redact(self, message: bytes) -> bytes:
        size = self.header_size
        return message[:size] + _card_data.mask(message[size:])


class Iso8583Codec(LengthHeaderCodec):
    name = "iso8583"
    summary = "ISO 8583 behind a 2-byte big-endian length"
    header_size = 2
    poll = b"\0\0"

    def length(self, header: bytes) -> int:
        return header[0] << 8 | header[1]


class MpuCodec(LengthHeaderCodec):
    name = "mpu"
    summary = "ISO 8583 behind a length of 4 ASCII digits"
    header_size = 4
    poll = b"0000"

    def length(self, header: bytes) -> int:
        # bytes.isdigit() is true for ASCII digits alone; int() would also take signs, blanks and underscores.
        if not header.isdigit():
            raise FramingError("a length header is not 4 ASCII digits")
        return int(header)
