"""Network management messages of ISO 8583 (0800, 1804): the echo tests and sign-ons of the hop between two neighbours.

They are rare, so they are decoded whole, by pyiso8583.
"""

from __future__ import annotations

import iso8583

from gmux.codecs._iso8583_key import KeyReader
from gmux.codecs._iso8583_spec import Spec
from gmux.errors import ConfigError, FramingError

#: Where a message says what it is for: field 70 in the version of 1987, field 24 in the later ones.
ECHO_TESTS = (("70", "301"), ("24", "831"))

#: What else is answered when the target asks: sign-on and sign-off. To approve a key exchange that nobody carries out
#: would leave the two sides with different keys.
SIGN_ONS = (("70", "001"), ("70", "002"), ("24", "801"), ("24", "802"))

RESPONSE_CODE, APPROVED = "39", "00"

#: A message with one of these would need a new one in its answer, which only its neighbours can make.
MACS = ("64", "128")


class NetworkManagement:
    """Answers such messages, and makes echo tests, by `spec`."""

    def __init__(self, spec: Spec, keys: KeyReader) -> None:
        self._spec = spec
        self._keys = keys

    def check(self) -> None:
        """Raises ConfigError when the spec lacks a field that an answer needs."""
        if self._encode({"t": "0810", "11": "000001", RESPONSE_CODE: APPROVED}) is None:
            raise ConfigError("--spec: answers to network management (t, 11, 39) cannot be written by it")

    def answer(self, message: bytes, only_echo_tests: bool) -> bytes | None:
        """What approves the network management request `message`; None: it is none, or cannot be answered here."""
        try:
            if not self._keys.is_network_request(message, 0):
                return None
            fields, _ = iso8583.decode(message, self._spec)
        except (FramingError, iso8583.DecodeError, KeyError):
            return None
        codes = ECHO_TESTS if only_echo_tests else ECHO_TESTS + SIGN_ONS
        if not any(fields.get(name) == code for name, code in codes):
            return None
        if RESPONSE_CODE in fields or any(name in fields for name in MACS):
            return None
        mti = fields["t"]
        return self._encode(fields | {"t": f"{mti[:2]}{int(mti[2]) + 1}{mti[3]}", RESPONSE_CODE: APPROVED})

    def echo_test(self, number: int, when: str) -> bytes | None:
        """A request for a sign of life; `number` from 1 to 999999, `when` as MMDDhhmmss in UTC."""
        return self._encode({"t": "0800", "7": when, "11": f"{number:06}", "70": "301"})

    def _encode(self, fields: dict[str, str]) -> bytes | None:
        try:
            return bytes(iso8583.encode({"h": ""} | fields, self._spec)[0])
        except (iso8583.EncodeError, KeyError):
            return None
