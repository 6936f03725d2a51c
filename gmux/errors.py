"""Every error gmux raises on purpose. Each class has one meaning.

GmuxError
    ConfigError             a setting is wrong: names the setting, the value and what is allowed
        ConfigErrors        several of these at once
    StartError              the service cannot start: a port in use, no permission
    ExchangeError           why a request gets no answer of the target
        FramingError        a peer broke the protocol
            MessageTooLarge a message is past its limit
            HeadTooLarge    a head (or one of its fields) is past its limit
            TargetNameTooLong  the target named in a request line is past its limit
            ExpectationFailed  the request asks for a behaviour that cannot be had
            Unsupported     the message asks for what this codec does not offer
            VersionUnsupported  a major version of the protocol that is not spoken
        RequestTimeout      a request once begun was not complete in time
        Overloaded          a limit of gmux is reached: clients, queue or memory
        QueueTimeout        no upstream connection became free in time
        ConnectError        the target cannot be reached
            ConnectTimeout  the target did not take the connection in time
        AnswerTimeout       the target was silent for too long
        UpstreamClosed      the upstream connection ended before the answer did
            Stopped         because the service did
        BadAnswer           the target's bytes are not an answer in this protocol
        AnswerTooLarge      an answer that its client does not take is past the limit

`cause` says who ended the exchange and in which phase, in the form `who/phase`; log lines carry it.
"""

from collections.abc import Sequence
from traceback import extract_tb


class GmuxError(Exception):
    """The base of all errors below."""


class ConfigError(GmuxError):
    """A setting is wrong; the text names it, its value and what is allowed."""


class ConfigErrors(ConfigError):
    """All that is wrong with a configuration, a line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class StartError(GmuxError):
    """The service cannot start; the text is the one line for the operator."""


class ExchangeError(GmuxError):
    """A request ends without an answer of the target; `str()` is the reason in one line."""

    cause = "gmux/exchange"


class FramingError(ExchangeError):
    cause = "client/request"


class MessageTooLarge(FramingError):
    pass


class HeadTooLarge(FramingError):
    pass


class TargetNameTooLong(FramingError):
    pass


class ExpectationFailed(FramingError):
    pass


class Unsupported(FramingError):
    pass


class VersionUnsupported(FramingError):
    pass


class RequestTimeout(ExchangeError):
    cause = "client/request"


class Overloaded(ExchangeError):
    cause = "gmux/limit"


class QueueTimeout(ExchangeError):
    cause = "pool/queue"


class ConnectError(ExchangeError):
    cause = "upstream/connect"


class ConnectTimeout(ConnectError):
    pass


class AnswerTimeout(ExchangeError):
    cause = "upstream/answer"


class UpstreamClosed(ExchangeError):
    cause = "upstream/answer"


class Stopped(UpstreamClosed):
    cause = "gmux/stop"


class BadAnswer(ExchangeError):
    cause = "upstream/answer"


class AnswerTooLarge(ExchangeError):
    cause = "client/answer"


def describe_fault(error: BaseException | None) -> str:
    """An error that nobody foresaw, in one line, with the place where it was raised."""
    places = extract_tb(error.__traceback__) if error is not None else []
    where = f" in {places[-1].filename}, line {places[-1].lineno}" if places else ""
    return f"{error!r}{where}"
