"""A terminal that sends ISO 8583 messages and shows the answers; reads commands from standard input.

Usage: iso8583_client.py [options] [ADDRESS]

ADDRESS is HOST:PORT or a port of 127.0.0.1; 8000, where gmux listens, unless given.

Options:
  --header KIND   the length before each message: binary (2 bytes; gmux's protocol iso8583)
                  or digits (4 ASCII digits; gmux's protocol mpu) [default: binary]
  --timeout TIME  longest wait for an answer, such as 500ms or 10s [default: 10s]
  -h --help       show this help and exit

Commands:
  echo                     an echo test (0800)
  buy AMOUNT [CARD]        a purchase (0200), such as: buy 12.50
  send FIELD=VALUE ...     any message, such as: send t=0100 3=000000 11=000007; the type is field t
  help, quit
"""

import itertools
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime

import iso8583
from iso8583.specs import default_ascii as SPEC

from gmux.codecs._buffer import Buffer
from gmux.codecs._card_data import SECRET_FIELDS
from gmux.codecs.base import Limits
from gmux.errors import FramingError
from gmux.kinds import parse_listen, parse_seconds
from gmux.net import format_address
from gmux.samples import command
from gmux.samples.iso8583 import BY_HEADER, Iso8583Target

TERMINAL = "TERM0001"
MERCHANT = "GMUX EXAMPLE".ljust(15)
#: A number that card schemes set aside for tests.
CARD = "4111111111111111"
EURO = "978"
ECHO_TEST = "301"


class Mistake(Exception):
    """A command that cannot be carried out; the text says why."""


class Terminal:
    """One connection to a host, which it closes; made and used by `main`."""

    def __init__(self, address: tuple[str, int], target: type[Iso8583Target], seconds: float) -> None:
        self._target = target
        self._codec = target.codec_class(Limits())
        self._buffer = Buffer()
        self._trace_numbers = itertools.count(1)
        self._sock = socket.create_connection(address, seconds or None)

    def close(self) -> None:
        self._sock.close()

    def obey(self, line: str) -> None:
        """Carry out one command. Raises Mistake, OSError, FramingError."""
        match line.split():
            case ["echo"]:
                self.exchange({"t": "0800", **self._stamp(), "70": ECHO_TEST})
            case ["buy", amount]:
                self._buy(amount, CARD)
            case ["buy", amount, card]:
                self._buy(amount, card)
            case ["send", *fields] if fields:
                self.exchange(dict(map(parse_field, fields)))
            case ["help"]:
                print(__doc__.partition("Commands:\n")[2].rstrip())
            case _:
                raise Mistake(f"not a command: {line}; see help")

    def exchange(self, request: dict[str, str]) -> None:
        """Send a message and show it and its answer, with card data hidden. Raises as `obey`."""
        try:
            message, _ = iso8583.encode(request, SPEC)
        except iso8583.EncodeError as error:
            raise Mistake(str(error)) from None
        show("sent", request)
        self._sock.sendall(self._target.wrap(bytes(message)))
        answer = self._receive()
        show("received", answer)
        if answer.get("11") != request.get("11"):
            raise FramingError("the answer has another trace number (field 11): it belongs to another request")

    def _receive(self) -> dict[str, str]:
        while (frame := self._codec.cut(self._buffer)) is None:
            data = self._sock.recv(4096)
            if not data:
                raise ConnectionError("the connection was closed")
            self._buffer.receive_data(data)
        try:
            answer, _ = iso8583.decode(frame[self._codec.header_size :], SPEC)
        except iso8583.DecodeError as error:
            raise FramingError(f"the answer is not an ISO 8583 message: {error}") from None
        return answer

    def _buy(self, amount: str, card: str) -> None:
        if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{2})?", amount, re.ASCII):
            raise Mistake(f"not an amount such as 12 or 12.50: {amount}")
        if not re.fullmatch(r"[0-9]{8,19}", card, re.ASCII):
            raise Mistake("not a card number, which has 8 to 19 digits")
        cents = amount.replace(".", "") if "." in amount else amount + "00"
        now = datetime.now()
        self.exchange(
            {
                "t": "0200",
                "2": card,
                "3": "000000",
                "4": cents.zfill(12),
                **self._stamp(),
                "12": f"{now:%H%M%S}",
                "13": f"{now:%m%d}",
                "41": TERMINAL,
                "42": MERCHANT,
                "49": EURO,
            }
        )

    def _stamp(self) -> dict[str, str]:
        return {"7": f"{datetime.now(UTC):%m%d%H%M%S}", "11": f"{next(self._trace_numbers) % 1_000_000:06}"}


def parse_field(text: str) -> tuple[str, str]:
    """The name and the value in `NAME=VALUE`. Raises Mistake."""
    name, _, value = text.partition("=")
    if not value or name not in SPEC or name in ("h", "p", "1"):
        raise Mistake(f"not a field with a value, such as t=0800 or 11=000007: {text}")
    return name, value


def show(title: str, message: dict[str, str]) -> None:
    """Print a message by its fields. Of a card number the first six and the last four digits show (PCI DSS 3.4.1)."""
    shown = {name: "*" * len(value) if name in SECRET_FIELDS else value for name, value in message.items()}
    if len(card := message.get("2", "")) > 10:
        shown["2"] = card[:6] + "*" * (len(card) - 10) + card[-4:]
    print(f"{title}:")
    iso8583.pp(shown, SPEC)
    sys.stdout.flush()


def commands() -> Iterator[str]:
    """The lines of standard input, with a prompt when a person types them."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "quit":
            return
        if line:
            yield line


def main() -> int:
    """Run the commands; the exit code is 1 when one of them failed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    words = command.parse(__doc__)
    target = command.value(words, "--header", BY_HEADER.__getitem__, " or ".join(BY_HEADER))
    host, port = command.value(words, "ADDRESS", parse_listen, "PORT, HOST:PORT or [IPV6]:PORT", "8000")
    seconds = command.value(words, "--timeout", parse_seconds, "a time such as 500ms or 10s")
    address = (host or command.HOST, port)
    code = 0
    try:
        with closing(Terminal(address, target, seconds)) as terminal:
            for line in commands():
                try:
                    terminal.obey(line)
                except Mistake as mistake:
                    print(mistake, file=sys.stderr)
                    code = 1
    except TimeoutError:
        command.fail(1, f"no answer within {seconds:g} s")
    except (OSError, FramingError) as error:
        command.fail(1, f"{format_address(address)}: {getattr(error, 'strerror', None) or error}")
    return code


if __name__ == "__main__":
    sys.exit(main())
