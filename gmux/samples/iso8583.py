"""The ISO 8583 targets: a host that approves everything, behind either length header.

Fields are those of pyiso8583's `default_ascii`: digits and bitmaps in ASCII.
"""

from __future__ import annotations

import itertools
import re

import iso8583
from iso8583.specs import default_ascii as SPEC

from gmux.codecs.base import Limits
from gmux.codecs.iso8583 import Iso8583Codec, LengthHeaderCodec, MpuCodec
from gmux.errors import FramingError
from gmux.samples.target import FrameTarget

#: Message types that ask for an answer: the third digit is the function, request (0), advice (2) or notice (4).
ASKING = re.compile(r"[0-9]{2}[024][0-9]")

#: What an answer repeats, so that its reader can tell which request it is for. The card number is not among them.
REPEATED = ("3", "4", "7", "11", "12", "13", "37", "41", "42", "49", "70")

#: Types whose approval has a number of its own: authorization and financial request.
NUMBERED = ("0100", "0200")

APPROVED = "00"


class Iso8583Target(FrameTarget):
    protocol = "iso8583"
    codec_class: type[LengthHeaderCodec] = Iso8583Codec
    approvals = itertools.count(1)

    @classmethod
    def wrap(cls, message: bytes) -> bytes:
        """The message behind its length header."""
        return cls.codec_class(Limits()).wrap(message)

    def answer(self, frame: bytes) -> bytes:
        try:
            request, _ = iso8583.decode(frame[self.codec_class.header_size :], SPEC)
        except iso8583.DecodeError as error:
            raise FramingError(f"not an ISO 8583 message: {error}") from None
        kind = request["t"]
        if not ASKING.fullmatch(kind):
            raise FramingError(f"message type {kind!r} asks for no answer")
        answer = {name: request[name] for name in REPEATED if name in request}
        answer["t"] = f"{kind[:2]}{int(kind[2]) + 1}{kind[3]}"
        answer["39"] = APPROVED
        if kind in NUMBERED:
            answer["38"] = f"{next(self.approvals) % 1_000_000:06}"
        message, _ = iso8583.encode(answer, SPEC)
        return self.wrap(bytes(message))


class MpuTarget(Iso8583Target):
    protocol = "mpu"
    codec_class = MpuCodec


#: The targets by their length header: 2 bytes, big-endian, or 4 ASCII digits.
BY_HEADER: dict[str, type[Iso8583Target]] = {"binary": Iso8583Target, "digits": MpuTarget}
