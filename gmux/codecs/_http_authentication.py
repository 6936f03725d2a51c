"""Schemes that authenticate a connection and not a request: NTLM, Negotiate and their kin.

HTTP has no such thing (RFC 9110 section 3.3). RFC 4559 section 6 says what it does to a proxy: once a target has
authenticated a connection, it takes all that comes there for that user's.
"""

from __future__ import annotations

import re

#: Each begins an element of a list. They are told by how their names begin: IIS has `Nego2` and `Negotiate:Kerberos`,
#: WinRM has `Kerberos` and `CredSSP`. A byte that is not printable in ASCII is a blank to some targets.
_SCHEME = re.compile(
    rb"(?:^|,) [^!-~]* ((?:ntlm|nego|kerberos|credssp|pku2u|livessp) [!-+\--~]*) [^!-~]* ([^,]?)",
    re.IGNORECASE | re.VERBOSE,
)

_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*"?')

#: IIS offers it together with a hint that is the same for all, which is no step of a handshake.
_HINTED = frozenset((b"nego2",))


def of_credentials(value: bytes) -> frozenset[bytes]:
    """The schemes of this kind, in small letters, in a field Authorization or Proxy-Authorization."""
    return frozenset(name.lower() for name, _ in _SCHEME.findall(value))


def of_tokens(value: bytes) -> frozenset[bytes]:
    """Those that have a token in a field WWW-Authenticate or Proxy-Authenticate.

    One without is an offer, and authenticates nobody (RFC 4559 section 4.1).
    """
    return frozenset(name.lower() for name, token in _SCHEME.findall(_QUOTED.sub(b"", value)) if token)


def is_step(schemes: frozenset[bytes]) -> bool:
    """Whether tokens of these schemes are a step of a handshake, also where the request had no credentials."""
    return not schemes <= _HINTED
