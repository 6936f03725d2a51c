"""How the pools of one budget share its slots: workers, services, the old and the new of a reload or an upgrade.

A pool that needs a connection and finds no free slot asks the others, by their mailboxes. Who can do without one hands
it over with its slot, open as it is: the target notices nothing, and at no instant is the lock free. The rules:

- A connection that was not used for a while goes to whoever has requests waiting, and so does an idle one to a pool
  that holds none.
- Else a pool gives to one that holds fewer slots. Where that would only swap the shares it keeps its own for a `SLICE`
  first, so that two pools with one slot between them take turns.
- A pool that drains gives to everyone who asks, also to those that only want to keep a connection open.

Asks are repeated until they are met, so one that is lost does no harm, and one that is not repeated is forgotten. A
slot that becomes free without a hand-over, by a kill for example, is found by looking.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from contextlib import suppress
from dataclasses import replace
from time import monotonic
from typing import Any

import gevent
from gevent.event import AsyncResult, Event

from gmux import net
from gmux.errors import ConnectError, StartError
from gmux.folder import Folder
from gmux.mailbox import Mailbox, Message, Sent
from gmux.slot_files import FileSlot, Process, SlotFiles
from gmux.slots import Ask, Grant, Lender, Slot, Slots, State

#: Seconds between two looks for a slot while requests wait, and while a connection is only to be kept.
RETRY_INTERVAL = 0.02
KEEP_INTERVAL = 1.0

#: Seconds for which it keeps what it is about to need again, as far as it knows.
IDLE_SLICE = 0.005

#: Seconds for which requests wait until the log names the processes that hold the slots. To wait for a turn is usual.
TELL_AFTER = 1.0

#: Seconds between two looks at whether the last slot was released.
JOIN_INTERVAL = 0.01

#: Seconds for which a pool keeps what another has as much need of.
SLICE = 0.05

#: What another process says is believed up to here: asks that are remembered, seconds for which one is, and numbers.
MAX_ASKS = 256
MAX_VALID = 10.0
MAX_COUNT = 1 << 53


class SharedSlots(Slots):
    """The slots of one budget, shared with all who have the same runtime folder."""

    def __init__(self, folder: Folder, budget: str, size: int, kind: str, log: logging.Logger) -> None:
        """`kind` is the same for pools that have use for each other's open connections. Raises StartError."""
        self._folder = folder
        self._files = SlotFiles(folder.path, budget, size)
        self._kind = kind
        self._log = log
        self._mailbox = Mailbox(folder, self._files.name)
        self._waiters: deque[AsyncResult] = deque()
        self._seeker: Any = None
        self._wake = Event()
        # Whether it looks at the longer intervals.
        self._is_at_leisure = False
        # With the time until which each is remembered; the first to ask is the first to be given.
        self._asks: dict[str, tuple[Ask, float]] = {}
        # When a slot was last taken from another pool, or given to one.
        self._since = monotonic()
        self._looks_again = False

    def open(self, lender: Lender) -> None:
        self._lender = lender
        self._mailbox.open(self._received, self._log)
        self._folder.watch(self._look)

    def _look(self) -> None:
        self._files.look(self._folder.warn, self._lender.revoke)

    def close(self) -> None:
        self._folder.unwatch(self._look)
        # What is on its way here is closed in good order, and not by the kernel in whatever order.
        self._mailbox.leave()
        self._mailbox.close()
        self._wake.set()

    def join(self) -> None:
        while len(self._files):
            gevent.sleep(JOIN_INTERVAL)

    # Getting slots.

    def acquire(self) -> Grant | None:
        if not self._waiters:
            slot = self._take()
            if slot is not None:
                return Grant(slot)
        waiter = AsyncResult()
        self._waiters.append(waiter)
        if self._seeker is None:
            self._seeker = gevent.spawn(self._seek)
        elif len(self._waiters) == 1:
            self._wake.set()  # it sleeps behind what the last one got
        try:
            grant: Grant | None = waiter.get()
        except BaseException:
            # Killed, perhaps with the grant on its way here.
            with suppress(ValueError):
                self._waiters.remove(waiter)
            if waiter.successful() and waiter.value is not None:
                waiter.value.give_back()
            raise
        return grant

    def _take(self) -> FileSlot | None:
        """A free slot, of a folder that is there. Raises ConnectError."""
        try:
            self._folder.mend()
        except StartError as error:
            raise ConnectError(str(error)) from None
        return self._files.take()

    def hurry(self) -> None:
        if self._is_at_leisure:
            self._is_at_leisure = False
            self._wake.set()

    def _seek(self) -> None:
        """Get a slot for each who waits for one, as long as it is wanted."""
        begin = monotonic()
        is_told = False
        try:
            while self._waiters:
                if len(self._waiters) > self._lender.wanted():
                    self._waiters.pop().set(None)
                    continue
                try:
                    slot = self._take()
                except Exception as error:  # of the folder: who waits makes the best of it
                    self._waiters.popleft().set_exception(error)
                    continue
                if slot is not None:
                    self._waiters.popleft().set(Grant(slot))
                    continue
                need = self._lender.need()
                if not need:
                    begin, is_told = monotonic(), False
                elif not is_told and monotonic() - begin >= TELL_AFTER:
                    is_told = True
                    self._log.info("waiting for a connection to the target held by %s", self._files.holders())
                is_soon = need or self._files.is_one_ending or self._files.is_half_way
                interval = RETRY_INTERVAL if is_soon else KEEP_INTERVAL
                self._ask(need, interval)
                self._is_at_leisure = not need
                self._wake.clear()
                self._wake.wait(interval)
        finally:
            self._seeker = None

    def _ask(self, need: int, interval: float) -> None:
        message = {
            "ask": self._mailbox.name,
            "held": len(self._files),
            "need": min(need, len(self._waiters)),
            "kind": self._kind,
            "process": str(self._files.process),
            "valid": 2 * interval,
        }
        for peer in self._mailbox.peers():
            self._mailbox.send(peer, message)

    # Giving slots.

    def begin_slice(self) -> None:
        self._since = monotonic()

    def has_asks(self) -> bool:
        now = monotonic()
        self._asks = {peer: (ask, end) for peer, (ask, end) in self._asks.items() if end > now}
        return bool(self._asks)

    def next_ask(self, state: State) -> Ask | None:
        if not self.has_asks():
            return None
        kept = monotonic() - self._since
        fewer = len(self._files) - (0 if kept >= SLICE else 1)
        is_idle = state is State.IDLE and kept >= IDLE_SLICE
        for ask, _ in self._asks.values():
            if state is State.DRAINING:
                return ask
            # Who cannot use the connection costs the target a new one, so it is not given for a moment's rest.
            may_rest = is_idle and not ask.held and self.is_kin(ask)
            if ask.need and (state is State.SPARE or ask.held < fewer or may_rest):
                return ask
        if state is State.IDLE and not self._looks_again:
            # No request may come that would give occasion to.
            self._looks_again = True
            gevent.get_hub().loop.timer(IDLE_SLICE).start(self._look_again)
        return None

    def _look_again(self) -> None:
        self._looks_again = False
        self._lender.lend()

    def is_kin(self, ask: Ask) -> bool:
        return ask.kind == self._kind

    def met(self, ask: Ask) -> None:
        _, end = self._asks.pop(ask.peer)
        if ask.need > 1:
            # Behind the others: each is to have one before one has two.
            self._asks[ask.peer] = replace(ask, held=ask.held + 1, need=ask.need - 1), end

    def give(self, ask: Ask, slot: Slot, sock: socket.socket | None = None, used: int = 0) -> bool:
        assert isinstance(slot, FileSlot)
        if not slot.is_in_place():
            return False  # it is no slot until it is mended
        message = {"slot": slot.path.name, "used": used}
        # Of a message that nobody reads any more the kernel drops the first one first, and the lock must be the last.
        descriptors = [slot.descriptor] if sock is None else [sock.fileno(), slot.descriptor]
        # Should the receiver die with the message unread, the next to take the slot waits for that one, not for this.
        slot.sign(ask.process)
        sent = self._mailbox.send(ask.peer, message, descriptors)
        if sent is not Sent.DONE:
            slot.sign_back()
            if sent is Sent.GONE:
                self._asks.pop(ask.peer, None)
            return False
        slot.let_go()
        self._since = monotonic()
        return True

    # Messages.

    def _received(self, message: Message, descriptors: list[int]) -> None:
        match message:
            case {"slot": str(name), "used": int(used)} if _is_count(used) and descriptors:
                is_believed = self._receive_slot(name, used, descriptors)
            case {
                "ask": str(peer),
                "held": int(held),
                "need": int(need),
                "kind": str(kind),
                "process": str(process),
                "valid": float(valid),
            } if _is_count(held) and _is_count(need) and 0 < valid <= MAX_VALID and not descriptors:
                is_believed = self._receive_ask(peer, held, need, kind, Process.parse(process), valid)
            case _:
                is_believed = False
        if not is_believed:
            # A connection before its slot.
            self._mailbox.reject(descriptors, "it is neither an ask of another gmux nor a slot with its connection")

    def _receive_ask(self, peer: str, held: int, need: int, kind: str, process: Process | None, valid: float) -> bool:
        """Remember an ask, and meet it if that may be; false: it is none."""
        if process is None or not self._mailbox.is_peer(peer):
            return False
        if len(self._asks) >= MAX_ASKS and peer not in self._asks:
            self.has_asks()  # forgets the old ones
            if len(self._asks) >= MAX_ASKS:
                return True  # it asks again
        self._asks[peer] = Ask(peer, held, need, kind, str(process)), monotonic() + valid
        self._lender.lend()
        return True

    def _receive_slot(self, name: str, used: int, descriptors: list[int]) -> bool:
        """Use a slot, with its connection if that came too; false: they are not what the message says."""
        *connection, lock = descriptors
        if not self._files.has(name, lock):
            return False
        sock = None
        if connection:
            sock = net.open_stream(connection[0], socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)
            if sock is None:
                return False
            try:
                if not self._lender.leads_to_target(sock):
                    sock.detach()
                    return False
            except OSError:  # it ended on its way
                sock.close()
                sock = None
        slot = self._files.hold(self._files.folder / name, lock)
        self._since = monotonic()
        self._use(Grant(slot, sock, used))
        return True

    def _use(self, grant: Grant, is_last_try: bool = False) -> None:
        if self._waiters:
            self._waiters.popleft().set(grant)
        elif self._lender.adopt(grant):
            return
        elif is_last_try:
            # All that the pool may have is being made, as where a reload made it smaller.
            grant.give_back()
        else:
            # Behind who was told in this turn of the loop that a slot is not wanted, or is about to wait for one.
            gevent.get_hub().loop.run_callback(self._use, grant, True)


def _is_count(number: int) -> bool:
    """Whether it is a number of things; `True` is an `int`, too."""
    return type(number) is int and 0 <= number <= MAX_COUNT
