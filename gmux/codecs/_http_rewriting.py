"""What gmux changes in the heads of requests: fields of its own, of the operator's, and of whom a request is from."""

from __future__ import annotations

from gmux.codecs import _http_head
from gmux.errors import ConfigError

#: Ways to tell the target of the client.
OFF, X_FORWARDED, FORWARDED = "off", "x-forwarded", "forwarded"

#: When gmux tells the target of the client, nobody else may: a client could claim to be any other.
FORWARDED_NAMES = frozenset((b"forwarded", b"x-forwarded-for", b"x-forwarded-host", b"x-forwarded-proto"))

#: Targets of HTTP/1.0 keep a connection only when they are asked to.
KEEP_ALIVE = b"Connection: keep-alive"

#: RFC 9110 section 10.1.4: TE is for the next hop, so Connection names it.
TAKE_TRAILERS = b"TE: trailers\r\nConnection: keep-alive, TE"

_NOT_TO_SET = _http_head.OURS | {b"via", b"trailer"}


class Rewriting:
    """The rules of one route.

    via         adds gmux to the Via field (RFC 9110 section 7.6.3)
    forwarded   whether, and in which form, the target learns the client's address and the host it asked for;
                what the client said of them itself is dropped
    set_header  names and values of fields that replace those of the client; an empty value: only dropped
    host        what the target gets as Host; empty: what the client asked for

    Raises ConfigError.
    """

    def __init__(self, via: bool, forwarded: str, set_header: tuple[tuple[str, str], ...], host: str) -> None:
        for name, _ in set_header:
            if name.lower().encode() in _NOT_TO_SET:
                hint = "use --host" if name.lower() == "host" else "gmux writes this field itself"
                raise ConfigError(f"--set-header: {name!r} is not allowed: {hint}")
        self.host = host.encode("latin-1")
        self.sets_fields = bool(set_header)
        self.forwards = forwarded != OFF
        self._forwarded = forwarded
        names = {name.lower().encode() for name, _ in set_header} | (FORWARDED_NAMES if self.forwards else set())
        #: Names in small letters that a client cannot set.
        self.replaced = frozenset(names)
        #: Names in small letters that are not simply passed on.
        self.ours = _http_head.OURS | self.replaced
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

    def drop_alike(self, lines: list[bytes]) -> list[bytes]:
        """`lines` without fields that WSGI and CGI cannot tell from replaced ones: `-` and `_` are one to them."""
        return lines[:1] + [line for line in lines[1:] if not self._is_alike(line.partition(b":")[0])]

    def _is_alike(self, name: bytes) -> bool:
        return b"_" in name and name.lower().replace(b"_", b"-") in self.replaced

    def forwarded_lines(self, client: str, host: bytes) -> bytes:
        """Who asked, for what host; `client` is an IP address, or empty where there is none."""
        client = client.partition("%")[0]  # the scope of an IPv6 address means nothing elsewhere
        if self._forwarded == X_FORWARDED:
            lines = [b"X-Forwarded-For: " + (client.encode() or b"unknown"), b"X-Forwarded-Proto: http"]
            return b"\r\n".join([*lines, b"X-Forwarded-Host: " + host] if host else lines)
        # RFC 7239 section 6: what has a colon is quoted, and IPv6 is in brackets.
        node = f'"[{client}]"' if ":" in client else client or "unknown"
        return b"Forwarded: for=" + node.encode() + (b';host="' + host + b'"' if host else b"") + b";proto=http"
