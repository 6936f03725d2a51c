"""ISO 8583 messages behind a length header: `iso8583` (2 bytes, big-endian) and `mpu` (4 ASCII digits).

Only the header is read for framing; it counts the message and not itself. A length of zero is a keepalive poll, as
jPOS channels send: it belongs to the hop, so it is answered here and never forwarded.

What a message is, by its type, is asked of each one, whatever the mode: a request of the target's own is no answer, and
an answer of a client's no request. By order an answer must also fit the request that is due.
"""

from __future__ import annotations

from gmux.codecs import _card_data
from gmux.codecs import _iso8583_identity as identities
from gmux.codecs._buffer import Buffer
from gmux.codecs._iso8583_identity import Identity
from gmux.codecs._iso8583_key import KeyReader
from gmux.codecs._iso8583_network import NetworkManagement
from gmux.codecs._iso8583_spec import SPECS, Spec
from gmux.codecs.base import (
    HANDLED,
    AnswerDecoder,
    Handled,
    KeyedPart,
    KeyedRequest,
    Limits,
    Part,
    Request,
    RequestDecoder,
    Unsolicited,
)
from gmux.codecs.framed import FramedCodec
from gmux.errors import BadAnswer, ConfigError, FramingError, MessageTooLarge

#: Polls in a row, without a message between, that are answered. A peer that answers polls as gmux does would otherwise
#: keep both busy for ever.
MAX_POLLS = 10_000

#: The spec that is none: by order, what a message is can be read without one.
AUTO = "auto"

#: By order an answer has this field of its request, unless --key-fields names others.
NUMBER = {"": (identities.NUMBER,)}


class LengthHeaderCodec(FramedCodec):
    """Base of the codecs with a length header of `header_size` bytes, read by `length` and written by `header`.

    `correlation`, `spec`, `key_fields` and `answer_network_management` are the settings of these names. The spec `auto`
    is `ascii` by key; by order it means that none is needed to read what a message is.
    """

    header_size: int
    poll: bytes

    def __init__(
        self,
        limits: Limits,
        correlation: str = "order",
        spec: str | Spec = AUTO,
        key_fields: tuple[tuple[str, tuple[int, ...]], ...] = (),
        answer_network_management: bool = False,
    ) -> None:
        super().__init__(limits)
        self.correlation = correlation
        mapping = SPECS["ascii" if spec == AUTO else spec] if isinstance(spec, str) else spec
        fields = dict(key_fields)
        self.keys = KeyReader(mapping, fields if correlation == "key" else NUMBER | fields)
        self.is_by_spec = correlation == "key" or spec != AUTO or bool(fields)
        self.network = NetworkManagement(mapping, self.keys)
        self.answers_network_management = answer_network_management
        if answer_network_management:
            self.network.check()

    def length(self, data: bytes) -> int:
        """The bytes of the message after the header that `data` begins with. Raises FramingError."""
        raise NotImplementedError

    def header(self, length: int) -> bytes:
        """The header of a message of `length` bytes."""
        raise NotImplementedError

    def request_decoder(self, client: str = "") -> RequestDecoder:
        return MessageRequestDecoder(self)

    def answer_decoder(self) -> AnswerDecoder:
        return MessageAnswerDecoder(self)

    def wrap(self, message: bytes) -> bytes:
        try:
            return self.header(len(message)) + message
        except OverflowError:
            raise FramingError("it is longer than its header can say") from None

    def make_request(self, message: bytes) -> Request:
        request = super().make_request(message)
        if len(request.data) == self.header_size:
            raise FramingError("it is empty")
        if self.correlation == "key":
            request = KeyedRequest(request.data, self.keys.read(message, 0)[0])
            request.pipelines = False
        return request

    def identify(self, frame: bytes) -> Identity | None:
        """What a message is; None: its type cannot be read."""
        at = self.header_size
        if not self.is_by_spec:
            return identities.identify(frame, at)
        try:
            kind, is_answer = self.keys.kind(frame, at)
        except FramingError:
            return None
        try:
            (name, *values), _ = self.keys.read(frame, at)
        except FramingError:
            return Identity(kind, is_answer, {})
        # The name has the kind, and then the numbers of the fields.
        return Identity(kind, is_answer, dict(zip(str(name).split()[1:], values, strict=True)))

    def is_answer(self, frame: bytes) -> bool:
        """Whether its type says so."""
        if not self.is_by_spec:
            return identities.is_known_answer(frame, self.header_size)
        identity = self.identify(frame)
        return identity is not None and identity.is_answer

    def fits(self, frame: bytes, request: bytes) -> bool:
        """Whether it may be the answer to `request`, another frame, as far as both can be read."""
        if not self.is_by_spec and identities.is_plain_answer(frame, request, self.header_size):
            return True
        identity = self.identify(frame)
        return identity is None or identity.fits(self.identify(request))

    def describe(self, message: bytes) -> str:
        at = self.header_size
        return self.keys.describe(message, at) if self.is_by_spec else identities.describe(message, at)

    def make_echo_test(self, number: int, when: str) -> Request:
        """See `NetworkManagement.echo_test`. Raises ConfigError when the spec has no such message."""
        message = self.network.echo_test(number, when)
        if message is None:
            raise ConfigError("--spec: echo tests (t, 7, 11, 70) cannot be written by it")
        return self.make_request(message)

    def cut(self, buffer: Buffer) -> bytes | None:
        """The next whole frame; a poll is one of its header alone."""
        size = self.header_size
        if len(buffer) < size:
            return None
        length = self.length(buffer.peek(size))
        if length > self.max_message:
            raise MessageTooLarge(f"a message of {length} bytes is longer than {self.max_message} (--max-message)")
        return None if len(buffer) < size + length else buffer.take(size + length)

    def redact(self, message: bytes) -> bytes:
        size = self.header_size
        return message[:size] + _card_data.mask(message[size:])


class Iso8583Codec(LengthHeaderCodec):
    name = "iso8583"
    summary = "ISO 8583 behind a 2-byte big-endian length"
    header_size = 2
    poll = b"\0\0"

    def length(self, data: bytes) -> int:
        return data[0] << 8 | data[1]

    def header(self, length: int) -> bytes:
        return length.to_bytes(2, "big")


class MpuCodec(LengthHeaderCodec):
    name = "mpu"
    summary = "ISO 8583 behind a length of 4 ASCII digits"
    header_size = 4
    poll = b"0000"

    def length(self, data: bytes) -> int:
        header = data[:4]
        # bytes.isdigit() is true for ASCII digits alone; int() would also take signs, blanks and underscores.
        if not header.isdigit():
            raise FramingError("a length header is not 4 ASCII digits")
        return int(header)

    def header(self, length: int) -> bytes:
        return b"%04d" % length


class MessageDecoder(Buffer):
    """What both sides share: frames without the polls between them, which are answered."""

    __slots__ = ("_codec", "_cut", "_header_size", "_is_keyed", "_length", "_manages", "_most", "_polls")

    def __init__(self, codec: LengthHeaderCodec) -> None:
        super().__init__()
        self._codec = codec
        self._cut = codec.cut
        self._header_size = codec.header_size
        self._length = codec.length
        self._most = codec.header_size + codec.max_message
        self._is_keyed = codec.correlation == "key"
        self._manages = codec.answers_network_management
        self._polls = 0

    def _next_frame(self) -> bytes | None:
        """Raises FramingError."""
        held = self.data
        size = self._header_size
        if type(held) is bytes and not self._start and size < len(held) == size + self._length(held) <= self._most:
            # Most come whole and alone.
            self.data = b""
            self._polls = 0
            return held
        frame = self._cut(self)
        if frame is None:
            return None
        if len(frame) == self._header_size:
            self._count_polls(1)
            self._skip_polls()
            frame = self._cut(self)
            if frame is None:
                return None
        self._polls = 0
        return frame

    def _skip_polls(self) -> None:
        poll = self._codec.poll
        size = self._header_size
        if self.peek(size) == poll:
            # All at once: one after the other, a read full of them would cost more than a thousand messages.
            held = self.peek(len(self))
            zeros = len(held) - len(held.lstrip(poll[:1]))
            self.take(zeros - zeros % size)
            self._count_polls(zeros // size)

    def _count_polls(self, number: int) -> None:
        answered = min(number, MAX_POLLS - self._polls)
        self._polls += answered
        self.owed += self._codec.poll * answered

    def _approve(self, frame: bytes, only_echo_tests: bool) -> bool:
        """Answer a network management request; whether it is one."""
        answer = self._codec.network.answer(frame[self._header_size :], only_echo_tests)
        if answer is None:
            return False
        self.owed += self._codec.header(len(answer)) + answer
        return True


class MessageRequestDecoder(MessageDecoder):
    __slots__ = ()

    def next_event(self) -> Request | Handled | None:
        frame = self._next_frame()
        if frame is None:
            return None
        if self._manages and self._approve(frame, only_echo_tests=True):
            return HANDLED
        # An answer to what was broadcast, perhaps, is nobody's, and has no answer: the request behind it would get
        # what is not its own.
        if self._is_keyed:
            key, is_answer = self._codec.keys.read(frame, self._header_size)
            return HANDLED if is_answer else KeyedRequest(frame, key)
        return HANDLED if self._codec.is_answer(frame) else Request(frame)

    @property
    def begun(self) -> Request | None:
        return None  # the refusal is the same for all


class MessageAnswerDecoder(MessageDecoder):
    __slots__ = ("may_pipeline", "request")

    def __init__(self, codec: LengthHeaderCodec) -> None:
        super().__init__(codec)
        self.request: Request | None = None
        self.may_pipeline = True

    def next_event(self) -> Part | None:
        try:
            frame = self._next_frame()
            if frame is None:
                return None
            if self._manages and self._approve(frame, only_echo_tests=False):
                return Unsolicited(frame, is_answer=False, is_handled=True)
            if self._is_keyed:
                return self._by_key(frame)
        except FramingError as error:
            raise BadAnswer(str(error)) from None
        request = self.request
        if request is not None and self._codec.fits(frame, request.data):
            self.request = None
            return Part(frame)
        identity = self._codec.identify(frame)
        return Part(frame) if identity is None else Unsolicited(frame, identity.is_answer)

    def _by_key(self, frame: bytes) -> Part:
        """Raises FramingError."""
        # One of the target's own may be of a form that --spec does not know, and needs no key.
        if not self._codec.keys.kind(frame, self._header_size)[1]:
            return Unsolicited(frame, is_answer=False)
        return KeyedPart(frame, self._codec.keys.read(frame, self._header_size)[0])

    def receive_eof(self) -> None:
        raise BadAnswer("the target closed the connection in the middle of its answer")

    @property
    def has_surplus(self) -> bool:
        if self.data:
            self._skip_polls()
        return len(self) > 0

    @property
    def is_replaceable(self) -> bool:
        return not self.has_surplus
