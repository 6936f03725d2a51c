"""ISO 8583 messages behind a length header: `iso8583` (2 bytes, big-endian) and `mpu` (4 ASCII digits).

Only the header is read for framing; it counts the message and not itself. A length of zero is a keepalive poll, as
jPOS channels send: it belongs to the hop, so it is dropped and never forwarded.
"""

from __future__ import annotations

from gmux.codecs import _card_data
from gmux.codecs._buffer import Buffer
from gmux.codecs._iso8583_key import SPECS, KeyReader, Spec
from gmux.codecs.base import AnswerDecoder, KeyedPart, KeyedRequest, Limits, RequestDecoder
from gmux.codecs.framed import FrameAnswerDecoder, FramedCodec, FrameRequestDecoder
from gmux.errors import BadAnswer, FramingError, MessageTooLarge


class LengthHeaderCodec(FramedCodec):
    """Base of the codecs with a length header of `header_size` bytes, read by `length`.

    `correlation`, `spec` and `key_fields` are the settings of these names. By order no field of a message is read.
    """

    header_size: int
    poll: bytes

    def __init__(
        self,
        limits: Limits,
        correlation: str = "order",
        spec: str | Spec = "ascii",
        key_fields: tuple[tuple[str, tuple[int, ...]], ...] = (),
    ) -> None:
        super().__init__(limits)
        self.correlation = correlation
        self._keys = KeyReader(SPECS[spec] if isinstance(spec, str) else spec, dict(key_fields))

    def request_decoder(self, client: str = "") -> RequestDecoder:
        return KeyedRequestDecoder(self, self._keys) if self.correlation == "key" else FrameRequestDecoder(self)

    def answer_decoder(self) -> AnswerDecoder:
        return KeyedAnswerDecoder(self, self._keys) if self.correlation == "key" else FrameAnswerDecoder(self)

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


class KeyedRequestDecoder(FrameRequestDecoder):
    __slots__ = ("_at", "_read_key")

    def __init__(self, codec: LengthHeaderCodec, keys: KeyReader) -> None:
        super().__init__(codec)
        self._read_key = keys.read
        self._at = codec.header_size

    def next_event(self) -> KeyedRequest | None:
        frame = self._cut(self)
        if frame is None:
            return None
        key, is_answer = self._read_key(frame, self._at)
        if is_answer:
            raise FramingError("a client sent an answer, by its message type")
        return KeyedRequest(frame, key)


class KeyedAnswerDecoder(FrameAnswerDecoder):
    __slots__ = ("_at", "_read_key")

    def __init__(self, codec: LengthHeaderCodec, keys: KeyReader) -> None:
        super().__init__(codec)
        self._read_key = keys.read
        self._at = codec.header_size

    def next_event(self) -> KeyedPart | None:
        try:
            frame = self._cut(self)
            return None if frame is None else KeyedPart(frame, *self._read_key(frame, self._at))
        except FramingError as error:
            raise BadAnswer(str(error)) from None
