"""What the codecs share whose messages are frames cut alike in both directions: one request, one answer, by order.

A codec of this kind says how a frame is cut; its refusal is to close the client's connection, because its protocol
has no words of its own for what went wrong between client and target.
"""

from __future__ import annotations

from gmux.codecs._buffer import Buffer
from gmux.codecs.base import AnswerDecoder, Limits, Part, Refusal, Request, RequestDecoder
from gmux.errors import BadAnswer, ExchangeError, FramingError

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

    def skip(self, buffer: Buffer) -> None:
        """Drop what stands before the next frame and belongs to the hop (keepalive polls); nothing, in most codecs."""

    def request_decoder(self, client: str = "") -> RequestDecoder:
        return FrameRequestDecoder(self)

    def answer_decoder(self) -> AnswerDecoder:
        return FrameAnswerDecoder(self)

    def refuse(self, error: ExchangeError, request: Request | None) -> Refusal:
        return CLOSE

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

    def take_reply(self) -> bytes:
        return b""


class FrameAnswerDecoder(Buffer):
    __slots__ = ("_cut", "_skip", "may_pipeline", "request")

    def __init__(self, codec: FramedCodec) -> None:
        super().__init__()
        self._cut = codec.cut
        self._skip = codec.skip
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
        if not self.data:
            return False
        self._skip(self)
        return len(self) > 0
