"""A target that authenticates connections, as IIS does with NTLM, and the messages of its three legs ([MS-NLMP])."""

from __future__ import annotations

import struct
from base64 import b64decode, b64encode
from typing import Any

from tests.support.clients import Client
from tests.support.framing import HTTP
from tests.support.target import Step, Steps, Target, send

SIGNATURE = b"NTLMSSP\0"

#: Unicode, NTLM, always sign.
FLAGS = 0x8201

#: Where the length and the offset of the user's name are in a message of type 3.
USER_AT = 36

#: Offers without a token.
OFFERS = b"WWW-Authenticate: Negotiate\r\nWWW-Authenticate: NTLM\r\n"


def _message(number: int, rest: bytes) -> bytes:
    return b64encode(SIGNATURE + struct.pack("<I", number) + rest)


TYPE_1 = _message(1, struct.pack("<I", FLAGS) + bytes(16))
TYPE_2 = _message(2, struct.pack("<HHII", 0, 0, 48, FLAGS) + b"challeng" + bytes(16))


def type_3(user: bytes) -> bytes:
    name = user.decode().encode("utf-16-le")
    buffers = [b""] * 3 + [name] + [b""] * 2
    fields = b"".join(struct.pack("<HHI", len(b), len(b), 64) for b in buffers)
    return _message(3, fields + struct.pack("<I", FLAGS) + name)


def user_of(message: bytes) -> bytes:
    length, _, offset = struct.unpack_from("<HHI", message, USER_AT)
    return message[offset : offset + length].decode("utf-16-le").encode()


def reply(status: bytes, body: bytes = b"", fields: bytes = b"") -> Step:
    return send(b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, fields, len(body), body))


def field(head: bytes, name: bytes) -> bytes:
    for line in head.split(b"\r\n"):
        found, _, value = line.partition(b":")
        if found.lower() == name:
            return value.strip()
    return b""


def authenticating(connection: Any, request: bytes) -> Steps:
    """The behaviour of the target. Each answer says as whom the connection is known, and the path.

    `Connection.user` and `Connection.has_challenged` are the state that lives on it. `/refused` declines whoever asks.
    """
    target = connection.target
    scheme, _, token = field(request, b"authorization").partition(b" ")
    message = b64decode(token) if scheme.lower() == b"ntlm" else b""
    if HTTP.payload(request) == b"refused":
        return (reply(b"401 Unauthorized", fields=OFFERS),)
    if message[8:9] == b"\1":
        connection.has_challenged = True
        return (reply(b"401 Unauthorized", fields=b"WWW-Authenticate: NTLM " + TYPE_2 + b"\r\n" + target.extra),)
    if message[8:9] == b"\3":
        if not getattr(connection, "has_challenged", False):
            return (reply(b"401 Unauthorized", fields=OFFERS),)
        connection.user = user_of(message)
    user = getattr(connection, "user", b"nobody")
    if user == b"nobody" and HTTP.payload(request).startswith(b"secret"):
        return (reply(b"401 Unauthorized", fields=OFFERS),)
    return (reply(b"200 OK", user + b" " + HTTP.payload(request), target.extra),)


class NtlmTarget(Target):
    """`extra` are fields of each answer but an offer."""

    def __init__(self, limit: int = 0, extra: bytes = b"") -> None:
        super().__init__(authenticating, HTTP, limit)
        self.extra = extra

    @property
    def users(self) -> set[bytes]:
        """As whom open connections are known."""
        return {getattr(c, "user", b"nobody") for c in self.connections if c.is_open}


class NtlmClient(Client):
    """`name` is the user it is when it authenticates itself."""

    def __init__(self, address: Any, name: bytes = b"") -> None:
        super().__init__(address, HTTP)
        self.name = name

    def put(self, path: bytes, authorization: bytes = b"", method: bytes = b"GET") -> None:
        fields = b"Authorization: " + authorization + b"\r\n" if authorization else b""
        self.send_raw(method + b" /" + path + b" HTTP/1.1\r\nHost: a\r\n" + fields + b"\r\n")

    def take(self) -> tuple[int, bytes]:
        answer = HTTP.read(self)
        return int(answer[9:12]), HTTP.payload(answer)

    def get(self, path: bytes, authorization: bytes = b"") -> tuple[int, bytes]:
        self.put(path, authorization)
        return self.take()

    def begin(self) -> None:
        """The first leg."""
        self.put(b"", b"NTLM " + TYPE_1)
        answer = HTTP.read(self)
        assert answer.startswith(b"HTTP/1.1 401 ") and b"NTLM " + TYPE_2 in answer, answer

    def finish(self, path: bytes = b"hello") -> tuple[int, bytes]:
        """The last leg."""
        return self.get(path, b"NTLM " + type_3(self.name))

    def sign_on(self) -> None:
        self.begin()
        assert self.finish() == (200, self.name + b" hello")
