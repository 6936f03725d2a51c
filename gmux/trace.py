"""Messages in hex, for `--verbose`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

#: Bytes of one message that are dumped; the rest is counted.
MAX_DUMP = 4096

WIDTH = 16


def hexdump(data: bytes) -> Iterator[str]:
    """Lines of offset, 16 bytes in hex, and the same as text."""
    for at in range(0, len(data), WIDTH):
        piece = data[at : at + WIDTH]
        text = "".join(chr(b) if 32 <= b < 127 else "." for b in piece)
        yield f"{at:08x}  {piece.hex(' '):<{WIDTH * 3 - 1}}  |{text}|"


class Trace:
    """Logs each message with its direction and its connection; secrets are overwritten unless `unsafe`."""

    def __init__(self, log: logging.Logger, redact: Callable[[bytes], bytes], unsafe: bool) -> None:
        self._log = log
        self._redact = redact if not unsafe else bytes

    def message(self, sender: str, receiver: str, connection: str, data: bytes) -> None:
        try:
            shown = self._redact(data)
        except Exception:  # a codec of another package: what it cannot redact is not shown, and the message goes on
            shown = b"*" * len(data)
        rest = f"\n... {len(shown) - MAX_DUMP} bytes more" if len(shown) > MAX_DUMP else ""
        dump = "\n".join(hexdump(shown[:MAX_DUMP]))
        self._log.debug("%s -> %s (%s) %d bytes\n%s%s", sender, receiver, connection, len(data), dump, rest)
