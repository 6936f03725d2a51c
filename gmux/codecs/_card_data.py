"""Overwriting card data (PCI DSS 3.x: PAN, tracks, PIN block, ICC data) in ISO 8583 messages before they are logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import iso8583
from iso8583.specs import default, default_ascii

MTI_SIZE = 4
SECRET_FIELDS = frozenset({"2", "34", "35", "36", "45", "52", "55"})


def mask(message: bytes) -> bytes:
    """`message` with its secret fields overwritten by `*`, byte for byte.

    The fields are found by decoding the whole message, as ASCII or as binary (pyiso8583's default specs). When neither
    fits, or both do, where the secrets are is unknown, so everything behind the message type is overwritten.
    """
    readings = [fields for spec in (default_ascii, default) if (fields := _decode(message, spec)) is not None]
    if len(readings) != 1:
        return message[:MTI_SIZE] + b"*" * (len(message) - MTI_SIZE)
    [encoded] = readings
    masked, at = bytearray(message), 0
    for name in ("h", "t", "p", *sorted((n for n in encoded if n.isdigit()), key=int)):
        field = encoded.get(name)
        if field is None:
            continue
        size = len(field["len"]) + len(field["data"])
        if name in SECRET_FIELDS:
            begin = at + len(field["len"])
            masked[begin : at + size] = b"*" * len(field["data"])
        at += size
    return bytes(masked)


def _decode(message: bytes, spec: Mapping[str, Any]) -> dict[str, dict[str, bytes]] | None:
    try:
        return iso8583.decode(message, spec)[1]
    except (iso8583.DecodeError, KeyError):
        # KeyError: bit 65 announces a third bitmap, whose fields (129 and above) the specs do not have.
        return None
