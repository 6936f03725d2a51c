"""The contract between a codec and the rest of gmux.

A codec is the framing of one application protocol and what gmux must know of its meaning. It is pure: bytes go in,
events come out; it knows no socket, clock, log or gevent. Limits are its arguments.

A codec makes one `RequestDecoder` for each client and one `AnswerDecoder` for each upstream connection. Both are kept
for the life of the connection, so bytes past the end of a message are never lost. The calls, in order:

    decoder.receive_data(data)      hand over what was read; `data` is never empty
    decoder.next_event()            the next event, or None: more bytes are needed; raises FramingError (requests) or
                                    BadAnswer (answers), after which the decoder is not used again
    decoder.receive_eof()           the peer sends no more; answers only: an answer may end so

A request comes as one `Request`; when its `whole` is false, `Part`s follow, the last one with `last`. A message of the
client that concerns this hop alone is `HANDLED`. An answer comes as one or more `Part`s. What they hold is what goes to
the other side, already in that side's wire form. Where the codec can tell that a message answers nothing that is due,
it comes as `Unsolicited`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

from gmux.errors import ExchangeError

#: Seconds for which an upstream connection may be idle when the target does not say.
NO_LIMIT = math.inf


@dataclass(frozen=True, slots=True)
class Limits:
    """What a codec accepts: the bytes of one message (framing excluded) and of one head (HTTP)."""

    max_message: int = 16 * 1024 * 1024
    max_head: int = 32 * 1024


class Request:
    """One request of a client, or its beginning.

    data        what goes to the target; the codec may complete it until the last part
    whole       false: `Part`s follow until the one with `last`
    repeatable  may be sent again when a reused connection closed before the first byte of the answer
    close       the client's connection ends after the answer
    pipelines   may be in flight on a connection together with others of the kind, before it and behind it

    A codec that must know more of it to frame the answer or to word a refusal makes a subclass.
    """

    __slots__ = ("data", "whole", "repeatable", "close", "pipelines")

    def __init__(
        self,
        data: bytes,
        whole: bool = True,
        repeatable: bool = False,
        close: bool = False,
        pipelines: bool = True,
    ) -> None:
        self.data = data
        self.whole = whole
        self.repeatable = repeatable
        self.close = close
        self.pipelines = pipelines


class KeyedRequest(Request):
    """One whose answer is found by its key, in protocols where answers come in any order."""

    __slots__ = ("key",)

    def __init__(self, data: bytes, key: Hashable) -> None:
        super().__init__(data)
        self.key = key


class Part:
    """A piece of a message: `data` (may be empty) and whether the message is complete with it.

    In an answer's last part, `close` ends the client's connection, `reusable` says whether the upstream connection
    may carry another request, and `idle_limit` for how many seconds the target keeps it without one.
    """

    __slots__ = ("data", "last", "close", "reusable", "idle_limit")

    def __init__(
        self,
        data: bytes,
        last: bool = True,
        close: bool = False,
        reusable: bool = True,
        idle_limit: float = NO_LIMIT,
    ) -> None:
        self.data = data
        self.last = last
        self.close = close
        self.reusable = reusable
        self.idle_limit = idle_limit


class PrivatePart(Part):
    """The last part of an answer after which the upstream connection is the asker's own, and takes no one else's
    requests: the target has authenticated the connection, and not the request. So it is again for each later answer.

    Not `reusable` to all others; a plain `Part` that is not ends the connection.
    """

    __slots__ = ()

    def __init__(self, data: bytes, close: bool = False, idle_limit: float = NO_LIMIT) -> None:
        super().__init__(data, True, close, False, idle_limit)


class Interim(Part):
    """A message before the answer itself; without data, one that does not go on. A refusal may still follow."""

    __slots__ = ()

    def __init__(self, data: bytes) -> None:
        super().__init__(data, last=False)


class Handled:
    """A client's message that the codec has dealt with: nothing goes on but what is owed."""

    __slots__ = ()


HANDLED = Handled()


class KeyedPart(Part):
    """A whole message of the target: the answer to the request with this key."""

    __slots__ = ("key",)

    def __init__(self, data: bytes, key: Hashable) -> None:
        super().__init__(data)
        self.key = key


class Unsolicited(Part):
    """A whole message of the target that does not answer the request that is due.

    `is_answer`: it answers some other request, as a late answer does, or a second one; else it is the target's own.
    `is_handled`: the codec has dealt with it; nothing is left to do but to send what is owed.
    """

    __slots__ = ("is_answer", "is_handled")

    def __init__(self, data: bytes, is_answer: bool, is_handled: bool = False) -> None:
        super().__init__(data, last=False)
        self.is_answer = is_answer
        self.is_handled = is_handled


class RequestDecoder(Protocol):
    """Frames what one client sends.

    The caller may set `data` to what was read, where it is empty; and to nothing, when it will ask for no more events.
    """

    #: Empty exactly when no bytes are held that no event has taken.
    data: bytes | bytearray

    def receive_data(self, data: bytes) -> None: ...

    def next_event(self) -> Request | Part | Handled | None: ...

    #: What the client is to get at once, such as 100 Continue or the answer to a keepalive; mostly empty.
    owed: bytes

    def __len__(self) -> int:
        """The bytes held that no event has taken."""
        ...

    def take_owed(self) -> bytes:
        """What is owed, once."""
        ...

    @property
    def begun(self) -> Request | None:
        """The request that came in part, or that `next_event` refused, as far as it is known; None: nothing is.

        For the words of a refusal, so its `close` is set. Asked only when there is one.
        """
        ...


class AnswerDecoder(Protocol):
    """Frames what one upstream connection sends, given the request it answers.

    Two of its attributes are set by the caller, because calls would be most of their cost on the hot path: `request`
    before each request is sent, and `data`, to what was read, where it is empty.
    """

    #: The request whose answer comes next.
    request: Request | None

    #: Empty exactly when no bytes are held that no event has taken.
    data: bytes | bytearray

    #: Whether the target has shown that this connection may carry several requests at a time.
    may_pipeline: bool

    #: What the target is to get at once, between two requests; mostly empty.
    owed: bytes

    def take_owed(self) -> bytes: ...

    def receive_data(self, data: bytes) -> None: ...

    def receive_eof(self) -> None:
        """The target sends no more. Raises BadAnswer unless the answer ends so; then `next_event` has the last part."""
        ...

    def next_event(self) -> Part | None: ...

    @property
    def has_surplus(self) -> bool:
        """Whether bytes are left over that no request has asked for."""
        ...

    @property
    def is_replaceable(self) -> bool:
        """Whether nothing that it has learnt of the connection is lost when another decoder goes on in its place."""
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client gets when gmux must answer itself: `data` (empty: nothing) and whether its connection ends."""

    data: bytes = b""
    close: bool = True


class Probe(Protocol):
    """Finds out whether a target answers requests that are sent together: each of them, and in their order.

    The caller sends what `requests` returns on a connection with nothing in flight, in one write, and hands over the
    parts of all answers. When all are complete and the connection is sound, it asks for the next ones.
    """

    #: Why the target does not, in words for the log. Empty when `requests` returns nothing: the target does.
    objection: str

    def requests(self) -> list[Request]:
        """What is to be sent together next; nothing: `objection` is the verdict. Never to be sent again."""
        ...

    def receive(self, part: Part, may_pipeline: bool) -> None:
        """A part of an answer; `may_pipeline` is that of the connection's decoder."""
        ...

    def fail(self, reason: str) -> None:
        """The connection ended, for this reason, before all was answered, or right after that.

        Without an objection the probe goes on, on another connection.
        """
        ...


class Codec(Protocol):
    """One protocol. Instances are shared by all connections of a route.

    They are made with their limits and, by name, the settings that are for this protocol alone (`Setting.protocols`);
    that may raise ConfigError.
    """

    name: str
    summary: str

    #: "order", or "key": then requests are `KeyedRequest`s, and what the target sends is `KeyedPart` or `Unsolicited`.
    correlation: str

    def __init__(self, limits: Limits) -> None: ...

    def request_decoder(self, client: str = "") -> RequestDecoder:
        """A decoder for one client; `client` is its IP address, empty where it has none."""
        ...

    def answer_decoder(self) -> AnswerDecoder: ...

    def make_request(self, message: bytes) -> Request:
        """A request of gmux's own with this message. Raises FramingError."""
        ...

    def make_echo_test(self, number: int, when: str) -> Request:
        """A request for a sign of life; `number` from 1 to 999999, `when` as MMDDhhmmss in UTC. Raises ConfigError.

        Only codecs need it that `--idle-check` is for.
        """
        ...

    def make_probe(self, depth: int, token: str) -> Probe | None:
        """What finds out whether the target answers up to `depth` requests that are sent together.

        None: no request is known to be harmless, or no answer shows which request it belongs to. `token` is random.
        """
        ...

    def refuse(self, error: ExchangeError, request: Request | None) -> Refusal:
        """The words of this protocol for `error`.

        `request` is the one that is refused, as far as it is known; with its `close` set, its client's connection ends.
        """
        ...

    def describe(self, message: bytes) -> str:
        """A few words for the log on a message of the target's that nobody asked for; nothing of it that is secret."""
        ...

    def redact(self, message: bytes) -> bytes:
        """The same number of bytes with what must not be logged (card data) overwritten."""
        ...
