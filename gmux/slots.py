"""Permissions to own one upstream connection, shared by all gmux processes of a machine (invariant 1).

This is what a pool knows of them: a keeper of slots (`Slots`), and the pool as that knows it (`Lender`). The keeper of
one machine is in `sharing`, over the files of `slot_files`.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from gevent import get_hub

from gmux import net


class Slot(Protocol):
    def release(self) -> None: ...

    def above(self, sock: socket.socket) -> socket.socket:
        """`sock`, or the same connection by another descriptor, so that a dying process closes it before the slot.

        Raises OSError.
        """


@dataclass(frozen=True, slots=True)
class Grant:
    """A slot that is held now, and the open connection that came with it, on which `used` requests were sent."""

    slot: Slot
    sock: socket.socket | None = None
    used: int = 0

    def give_back(self) -> None:
        """End the connection with a reset, as it must not outlive the slot, and release that when the target knows."""
        if self.sock is None:
            self.slot.release()
        else:
            net.prepare_reset(self.sock)
            self.sock.close()
            release_after_reset(self.slot)


def release_after_reset(slot: Slot) -> None:
    """Release the slot of a connection that was reset now: the target's program needs a moment to see that."""
    get_hub().loop.timer(net.RESET_PATIENCE).start(slot.release)


@dataclass(frozen=True, slots=True)
class Ask:
    """What another pool of the same budget says: how many slots it holds, and how many requests wait there.

    `kind` tells whether an open connection is of use to it; `process` is what its slots name as their holder.
    """

    peer: str
    held: int
    need: int
    kind: str
    process: str = ""


class State(Enum):
    """How much need a pool has of a connection of its own that is free, from the most to the least."""

    BUSY = auto()  # requests wait
    IDLE = auto()
    SPARE = auto()  # it was not used for a while
    DRAINING = auto()  # no requests will come


class Lender(Protocol):
    """A pool, as the keeper of its slots knows it. No call may switch greenlets."""

    def wanted(self) -> int:
        """The connections that it would make if it had the slots."""

    def need(self) -> int:
        """Its requests that wait."""

    def lend(self) -> None:
        """Somebody asks: give what may be given, by `next_ask` and `give`."""

    def adopt(self, grant: Grant) -> bool:
        """A slot came that is not waited for any more; false: there is no place for it now.

        It is called once more in this turn of the loop, behind those that may be about to make room.
        """

    def leads_to_target(self, sock: socket.socket) -> bool:
        """Whether a stream socket of another process is a connection to the target. Raises OSError: it has ended."""

    def revoke(self, slot: Slot) -> None:
        """The slot is another's by now: end its connection at once. Called again until it is released."""


class Slots:
    """Keeper of the slots of one pool. This one has no end of them and shares them with nobody."""

    def open(self, lender: Lender) -> None:
        """Begin; asks of others come from now on."""

    def acquire(self) -> Grant | None:
        """A slot, or None when it is not wanted any more; switches greenlets. Raises ConnectError."""
        return Grant(FREE)

    def hurry(self) -> None:
        """Requests wait now."""

    def next_ask(self, state: State) -> Ask | None:
        """Who is to get a connection that is free."""
        return None

    def begin_slice(self) -> None:
        """A connection that others ask for has its first request here now."""

    def has_asks(self) -> bool:
        return False

    def is_kin(self, ask: Ask) -> bool:
        """Whether an open connection is of use to it."""
        return False

    def met(self, ask: Ask) -> None:
        """It gets one connection."""

    def give(self, ask: Ask, slot: Slot, sock: socket.socket | None = None, used: int = 0) -> bool:
        """Hand a slot over, with its connection if there is one; whether it is the other's now."""
        return False

    def close(self) -> None:
        """No more asks."""

    def join(self) -> None:
        """Wait until no slot is held any more; switches greenlets."""


class _Free:
    def release(self) -> None:
        pass

    def above(self, sock: socket.socket) -> socket.socket:
        return sock


FREE = _Free()
