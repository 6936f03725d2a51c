"""What the codecs share whose messages are frames cut alike in both directions: one request, one answer, by order.

A codec of this kind says how a frame is cut; its refusal is to close the client's connection, because its protocol
has no words of its own for what went wrong between client and target.
"""

from __future__ import annotations

from gmux.codecs._buffer import Buffer
from gmux.codecs.base import AnswerDecoder, Limits, Part, Probe, Refusal, Request, RequestDecoder
from gmux.errors import BadAnswer, ConfigError, ExchangeError, FramingError

CLOSE = Refusal()


class FramedCodec:
    """Base of the codecs of frames. Subclasses set `name` and `summary` and define `cut`."""

    name: str
    summary: str
    correlation = "order"

    def __init__(self, limits: Limits) -> None:
        self.max_message = limits.max_message

    def cut(self, buffer: Buffer) -> bytes | None:
        """Take the next whole frame off `buffer`; None: more bytes are needed. Raises FramingError."""
        raise NotImplementedError

    def wrap(self, message: bytes) -> bytes:
        """The frame that carries `message`."""
        return message

    def make_request(self, message: bytes) -> Request:
        frame = self.wrap(message)
        buffer = Buffer()
        buffer.receive_data(frame)
        if not frame or self.cut(buffer) != frame:
            raise FramingError("it is not one whole message")
        return Request(frame, pipelines=False)

    def make_echo_test(self, number: int, when: str) -> Request:
        raise ConfigError(f"--idle-check: {self.name} has no echo test")

    def make_probe(self, depth: int, token: str) -> Probe | None:
        return None

    def request_decoder(self, client: str = "") -> RequestDecoder:
        return FrameRequestDecoder(self)

    def answer_decoder(self) -> AnswerDecoder:
        return FrameAnswerDecoder(self)

    def refuse(self, error: ExchangeError, request: Request | None) -> Refusal:
        return CLOSE

    def describe(self, message: bytes) -> str:
        return f"{len(message)} bytes"

    def redact(self, message: bytes) -> bytes:
        return message


class FrameRequestDecoder(Buffer):
    __slots__ = ("_cut",)

    def __init__(self, codec: FramedCodec) -> None:
        super().__init__()
        self._cut = codec.cut

    def next_event(self) -> Request | None:
        frame = self._cut(self)
        return None if frame is None else Request(frame)

    @property
    def begun(self) -> Request | None:
        return None  # the refusal is the same for all


class FrameAnswerDecoder(Buffer):
    __slots__ = ("_cut", "may_pipeline", "request")

    def __init__(self, codec: FramedCodec) -> None:
        super().__init__()
        self._cut = codec.cut
        self.request: Request | None = None
        self.may_pipeline = True

    def next_event(self) -> Part | None:
        try:
            frame = self._cut(self)
        except FramingError as error:
            raise BadAnswer(str(error)) from None
        return None if frame is None else Part(frame)

    def receive_eof(self) -> None:
        raise BadAnswer("the target closed the connection in the middle of its answer")

    @property
    def has_surplus(self) -> bool:
        return bool(self.data)

    @property
    def is_replaceable(self) -> bool:
        return not self.data
