"""What gmux changes in the heads of requests: fields of its own, of the operator's, and of whom a request is from."""

from __future__ import annotations

import re

from gmux.codecs import _http_head
from gmux.errors import ConfigError

#: Ways to tell the target of the client.
OFF, X_FORWARDED, FORWARDED = "off", "x-forwarded", "forwarded"

#: When gmux tells the target of the client, nobody else may: a client could claim to be any other, or to speak https.
#: These are dropped, and all that begin with the prefix.
FORWARDED_NAMES = frozenset((b"forwarded", b"x-real-ip", b"front-end-https", b"x-url-scheme", b"x-forwarded"))
FORWARDED_PREFIX = b"x-forwarded-"

#: Targets of HTTP/1.0 keep a connection only when they are asked to.
KEEP_ALIVE = b"Connection: keep-alive"

#: RFC 9110 section 10.1.4: TE is for the next hop, so Connection names it.
TAKE_TRAILERS = b"TE: trailers\r\nConnection: keep-alive, TE"

_NOT_TO_SET = _http_head.OURS | {b"via", b"trailer", b"max-forwards"}

_NOT_ALPHANUMERIC = re.compile(rb"[^a-z0-9]")


def canonical(name: bytes) -> bytes:
    """The same for all names that CGI and its kin cannot tell apart: HTTP_X_USER for X-User, x_user and X.User."""
    return _NOT_ALPHANUMERIC.sub(b"-", name.lower())


class Rewriting:
    """The rules of one route.

    via         adds gmux to the Via field (RFC 9110 section 7.6.3)
    forwarded   whether, and in which form, the target learns the client's address and the host it asked for;
                what the client said of them itself is dropped
    set_header  names and values of fields that replace those of the client; an empty value: only dropped
    host        what the target gets as Host; empty: what the client asked for
    authority   host and port of the target, for clients of HTTP/1.0 that ask for none (RFC 9112 section 3.3)

    Raises ConfigError.
    """

    def __init__(
        self, via: bool, forwarded: str, set_header: tuple[tuple[str, str], ...], host: str, authority: str = ""
    ) -> None:
        self.host = host.encode("latin-1")
        self.authority = authority.encode("latin-1")
        self.sets_fields = bool(set_header)
        self.forwards = forwarded != OFF
        self._forwarded = forwarded
        self._replaced = frozenset(canonical(name.encode()) for name, _ in set_header)
        for name, _ in set_header:
            lower = name.lower().encode()
            hint = "use --host" if lower == b"host" else "gmux writes this field itself"
            if lower in _NOT_TO_SET or (self.forwards and self._is_claim(canonical(lower))):
                raise ConfigError(f"--set-header: {name!r} is not allowed: {hint}")
        self._replaces = self.sets_fields or self.forwards
        #: Whether it does more than to add lines that are always the same.
        self.changes = self._replaces or bool(self.host)
        fields = [f"{name}: {value}".encode("latin-1") for name, value in set_header if value]
        self._ends = tuple(
            tuple(
                b"\r\n".join([*fields, *([_http_head.via(minor_version)] if via else []), connection]) + _http_head.END
                for connection in (KEEP_ALIVE, TAKE_TRAILERS)
            )
            for minor_version in (0, 1)
        )
        #: What most heads end with: those of HTTP/1.1 whose client has no wish for trailers.
        self.usual_end = self._ends[1][0]

    def end(self, minor_version: int, takes_trailers: bool) -> bytes:
        """The last lines of each head and the empty line."""
        return self._ends[minor_version][takes_trailers]

    def drop_replaced(self, lines: list[bytes]) -> list[bytes]:
        """`lines` without the fields that a client cannot set, in any spelling that a target may take for them."""
        return lines[:1] + [line for line in lines[1:] if not self._is_replaced(line)]

    def drop_from_trailers(self, trailers: bytes) -> bytes:
        """The same for trailers, lines with their ends."""
        if not self._replaces:
            return trailers
        return b"".join(line for line in trailers.splitlines(keepends=True) if not self._is_replaced(line))

    def _is_replaced(self, line: bytes) -> bool:
        name = canonical(line.partition(b":")[0])
        return name in self._replaced or (self.forwards and self._is_claim(name))

    @staticmethod
    def _is_claim(name: bytes) -> bool:
        """Whether a field of this canonical name says who asks, and how."""
        return name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIX)

    def forwarded_lines(self, client: str, host: bytes) -> bytes:
        """Who asked, for what host; `client` is an IP address, or empty where there is none."""
        client = client.partition("%")[0]  # the scope of an IPv6 address means nothing elsewhere
        if self._forwarded == X_FORWARDED:
            lines = [b"X-Forwarded-For: " + (client.encode() or b"unknown"), b"X-Forwarded-Proto: http"]
            return b"\r\n".join([*lines, b"X-Forwarded-Host: " + host] if host else lines)
        # RFC 7239 section 6: what has a colon is quoted, and IPv6 is in brackets.
        node = f'"[{client}]"' if ":" in client else client or "unknown"
        return b"Forwarded: for=" + node.encode() + (b';host="' + host + b'"' if host else b"") + b";proto=http"
