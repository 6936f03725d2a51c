"""Bytes go out of a spool as they came in, and its limits hold, in memory and on disk."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import gmux.disk
from gmux import spool
from gmux.disk import BLOCK, Disk, Full
from gmux.memory import ALLOWANCE, MARGIN, Memory
from gmux.spool import Spool

#: More than any test here puts on disk.
ROOMY = 1 << 40


def drain(held: Spool) -> bytes:
    """All of it, in the manner of gmux: read until nothing comes."""
    pieces = iter(held.read, b"")
    return b"".join(pieces)


def open_files() -> int:
    """Those with bytes on a disk: a socket of an earlier test may be closed at any time, by the garbage collector."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor with which the folder was listed
            found += stat.S_ISREG(os.fstat(int(number)).st_mode)
    return found


def test_spool_in_memory_gives_back_what_was_written():
    memory = Memory(100)
    held = Spool(memory, Disk(ROOMY), 100, 1000)
    held.write(b"one ")
    held.write(b"two")
    assert (len(held), memory.used) == (7, 7)
    assert drain(held) == b"one two"
    assert (len(held), memory.used) == (0, 0)
    assert held.read() == b""


def test_spool_above_its_memory_goes_on_in_a_file_in_order():
    memory = Memory(1000)
    held = Spool(memory, Disk(ROOMY), 10, 1000)
    for piece in (b"123456", b"7890", b"abc", b"de"):
        held.write(piece)
    assert (len(held), memory.used) == (15, 10)
    assert held.read() == b"1234567890"
    # The file is not empty: what comes now stands behind it, although memory has room.
    held.write(b"f")
    assert memory.used == 0
    assert drain(held) == b"abcdef"


def test_spool_without_common_memory_uses_a_file():
    memory = Memory(10)
    disk = Disk(ROOMY)
    first, second = Spool(memory, disk, 100, 100), Spool(memory, disk, 100, 100)
    first.write(b"12345")
    second.write(b"6")
    assert memory.used == 5
    assert (drain(first), drain(second)) == (b"12345", b"6")


def test_emptied_file_is_closed_and_memory_serves_again():
    memory = Memory(100)
    held = Spool(memory, Disk(ROOMY), 4, 100)
    before = open_files()
    held.write(b"too long")
    assert open_files() == before + 1
    assert drain(held) == b"too long"
    assert open_files() == before
    held.write(b"new")
    assert memory.used == 3


def test_file_is_read_in_chunks():
    held = Spool(Memory(0), Disk(ROOMY), 0, 1 << 20)
    held.write(b"x" * (2 * BLOCK + 1))
    assert [len(piece) for piece in iter(held.read, b"")] == [BLOCK, BLOCK, 1]


@pytest.mark.parametrize("memory_limit", [0, 10, 5])
def test_spool_at_its_limit_is_full_and_keeps_what_it_has(memory_limit):
    memory = Memory(100)
    held = Spool(memory, Disk(ROOMY), memory_limit, 10)
    held.write(b"12345")
    held.write(b"67890")
    with pytest.raises(Full, match="more than 10 bytes"):
        held.write(b"x")
    assert len(held) == 10
    assert drain(held) == b"1234567890"
    held.write(b"again")
    assert drain(held) == b"again"
    assert memory.used == 0


def test_close_drops_everything_and_may_be_called_twice():
    memory = Memory(100)
    held = Spool(memory, Disk(ROOMY), 4, 100)
    before = open_files()
    held.write(b"1234")
    held.write(b"on disk")
    held.close()
    held.close()
    assert (len(held), memory.used, open_files()) == (0, 0, before)
    assert held.read() == b""


def test_empty_write_does_not_hide_what_follows():
    held = Spool(Memory(spool.SMALL), Disk(ROOMY), spool.SMALL, 1 << 20)
    held.write(b"x" * spool.SMALL)
    held.write(b"")
    held.write(b"on disk")
    assert drain(held) == b"x" * spool.SMALL + b"on disk"


def test_many_tiny_writes_are_few_chunks():
    held = Spool(Memory(1 << 20), Disk(ROOMY), 1 << 20, 1 << 20)
    began = time.process_time()
    for _ in range(100_000):
        held.write(b"x")
    assert len(list(iter(held.read, b""))) <= 100_000 / spool.SMALL + 1
    assert time.process_time() - began < 2


# A disk that is full.


def test_temporary_file_that_cannot_be_made_is_full(monkeypatch):
    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gmux.disk, "TemporaryFile", refuse)
    held = Spool(Memory(100), Disk(ROOMY), 4, 100)
    held.write(b"1234")
    with pytest.raises(Full, match="No space left on device"):
        held.write(b"5")
    assert len(held) == 4
    assert drain(held) == b"1234"


FULL_DISK = """
import resource
from gmux.disk import Disk, Full
from gmux.memory import Memory
from gmux.spool import Spool

resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
memory = Memory(1000)
held = Spool(memory, Disk(1 << 30), 1000, 1 << 30)
held.write(b"a" * 1000)
held.write(b"b" * 40_000)
try:
    held.write(b"c" * 40_000)  # the first half of it fits
except Full as error:
    print(error)
assert len(held) == 41_000
held.write(b"d" * 10_000)
assert b"".join(iter(held.read, b"")) == b"a" * 1000 + b"b" * 40_000 + b"d" * 10_000
assert (len(held), memory.used) == (0, 0)
"""


def test_file_that_the_disk_does_not_take_is_full_and_keeps_what_it_has():
    # The kernel's limit on the size of a file acts as a disk that is full: a partial write, then an error.
    done = subprocess.run([sys.executable, "-c", FULL_DISK], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout == "the temporary file cannot be written: File too large\n"


# Any interleaving.


PATTERN = bytes(range(251))


class SpoolsModel(RuleBasedStateMachine):
    """Three spools that share one memory and one disk, and a bytearray for each."""

    LIMIT = 5 * BLOCK
    MEMORY_LIMIT = 9_000
    DISK_LIMIT = 8 * BLOCK

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(12_000)
        self.disk = Disk(self.DISK_LIMIT)
        self.spools = [Spool(self.memory, self.disk, self.MEMORY_LIMIT, self.LIMIT) for _ in range(3)]
        self.models = [bytearray() for _ in self.spools]
        self.count = 0

    which = st.integers(0, 2)
    size = st.one_of(
        st.integers(0, 50),
        st.sampled_from([4095, 4096, 4097, 8999, 9000, 9001, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 4 * BLOCK]),
        st.integers(0, LIMIT + 1000),
    )

    def write_to(self, which: int, data: bytes) -> bool:
        try:
            self.spools[which].write(data)
        except Full:
            return False
        return True

    @rule(which=which, size=size)
    def write(self, which: int, size: int) -> None:
        # Each byte tells where it comes from, so that a wrong order shows.
        data = (PATTERN * (size // len(PATTERN) + 2))[self.count % 251 :][:size]
        self.count += size
        model = self.models[which]
        if self.write_to(which, data):
            model += data
        else:
            # Each spool may waste less than two blocks of the disk.
            held = sum(map(len, self.models)) + size
            assert len(model) + size > self.LIMIT or held > self.DISK_LIMIT - 6 * BLOCK
        assert len(model) <= self.LIMIT

    @rule(which=which)
    def read(self, which: int) -> None:
        model = self.models[which]
        data = self.spools[which].read()
        assert bool(data) == bool(model)
        assert data == model[: len(data)]
        del model[: len(data)]

    @rule(which=which, part=st.integers(0, 100))
    def take_a_part(self, which: int, part: int) -> None:
        """As a socket does that takes only some of it."""
        model = self.models[which]
        data = self.spools[which].peek()
        assert bool(data) == bool(model)
        assert data == model[: len(data)]
        size = len(data) * part // 100
        self.spools[which].skip(size)
        del model[:size]

    @rule(which=which)
    def read_all(self, which: int) -> None:
        assert drain(self.spools[which]) == self.models[which]
        self.models[which].clear()

    @rule(which=which)
    def close(self, which: int) -> None:
        self.spools[which].close()
        self.models[which].clear()

    @invariant()
    def counts_are_right(self) -> None:
        assert [len(s) for s in self.spools] == [len(m) for m in self.models]
        assert 0 <= self.memory.used <= self.memory.limit

    @invariant()
    def blocks_are_held_once_or_free(self) -> None:
        held = [block for s in self.spools for block in s._blocks]
        count, free = self.disk._count, self.disk._free
        assert sorted(held + free) == list(range(count))
        assert count not in [block + 1 for block in free]
        assert count <= self.DISK_LIMIT // BLOCK
        assert (self.disk._file is None) == (not held)
        if self.disk._file is not None:
            assert os.fstat(self.disk._file.fileno()).st_size <= count * BLOCK

    @precondition(lambda self: not any(self.models))
    @invariant()
    def empty_spools_hold_nothing(self) -> None:
        assert self.memory.used == 0
        assert self.disk._file is None

    def teardown(self) -> None:
        for held in self.spools:
            held.close()
        assert self.memory.used == 0


TestSpoolsModel = SpoolsModel.TestCase
TestSpoolsModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


# Memory.


def test_memory_takes_up_to_its_limit_and_counts_nothing_past_it():
    memory = Memory(10)
    assert memory.take(10)
    assert not memory.take(1)
    assert memory.used == 10
    memory.give(4)
    assert not memory.take(5)
    assert memory.take(4)
    assert memory.used == 10


def test_memory_keeps_room_for_clients_as_far_as_half_of_it():
    memory = Memory(8 * ALLOWANCE, max_clients=100)
    assert not memory.take(4 * ALLOWANCE + 1)
    assert memory.take(4 * ALLOWANCE)
    assert [memory.admit() for _ in range(5)] == [True] * 4 + [False]
    memory.give(2 * ALLOWANCE)
    assert memory.admit()
    assert not memory.take(ALLOWANCE + 1)
    assert memory.take(ALLOWANCE)
    assert not memory.admit()
    memory.dismiss()
    assert memory.take(ALLOWANCE)
    assert not memory.take(1)


def test_memory_that_is_spared_for_requests_is_taken_by_no_spool():
    memory = Memory(10)
    assert not memory.take_spare(6)
    assert memory.take_spare(5)
    assert not memory.take_spare(1)
    assert memory.take(5)


def test_memory_is_scarce_from_half_of_it_less_one_read():
    memory = Memory(4 * MARGIN)
    assert memory.take(MARGIN)
    assert not memory.is_scarce
    assert memory.take(1)
    assert memory.is_scarce
    memory.give(1)
    assert not memory.is_scarce


def test_memory_keeps_no_more_room_than_its_clients_need():
    memory = Memory(8 * ALLOWANCE, max_clients=1)
    assert memory.take(7 * ALLOWANCE)
    assert [memory.admit(), memory.admit()] == [True, False]


# Disk.


def test_spools_on_one_disk_have_one_file_between_them_and_close_it_when_all_is_read():
    disk, before = Disk(ROOMY), open_files()
    spools = [Spool(Memory(0), disk, 0, 1 << 20) for _ in range(50)]
    for number, held in enumerate(spools):
        held.write(b"%d" % number * BLOCK)
    assert open_files() == before + 1
    assert [drain(held) for held in spools] == [b"%d" % number * BLOCK for number in range(50)]
    assert open_files() == before


def test_disk_at_its_limit_is_full_by_name_and_has_room_again_when_some_is_read():
    disk = Disk(3 * BLOCK)
    first, second = (Spool(Memory(0), disk, 0, 1 << 20) for _ in range(2))
    first.write(b"a" * 2 * BLOCK)
    with pytest.raises(Full, match=r"196608 bytes \(--disk-limit\)"):
        second.write(b"b" * (BLOCK + 1))
    assert len(second) == 0
    second.write(b"b" * BLOCK)
    first.read()
    second.write(b"c" * BLOCK)
    assert drain(first) == b"a" * BLOCK
    assert drain(second) == b"b" * BLOCK + b"c" * BLOCK


def test_disk_without_room_opens_no_file():
    before = open_files()
    with pytest.raises(Full, match="--disk-limit"):
        Spool(Memory(0), Disk(0), 0, 1 << 20).write(b"x")
    assert open_files() == before


def test_disk_is_given_back_from_the_end_and_filled_from_the_beginning():
    disk = Disk(ROOMY)
    blocks = disk.take(4)
    disk.give(blocks[:2])
    assert disk._file is not None
    disk.write(3, 0, b"x" * BLOCK)
    assert os.fstat(disk._file.fileno()).st_size == 4 * BLOCK
    disk.give([3])
    assert os.fstat(disk._file.fileno()).st_size == 3 * BLOCK
    assert disk.take(3) == [0, 1, 3]
    disk.give(range(4))
    assert disk._file is None


def test_spool_read_in_step_with_writing_uses_no_more_disk_than_its_limit():
    """A reader that stays a little behind never lets the spool run empty; what it has read must not stay on disk."""
    megabyte, limit = 1 << 20, 32 << 20

    def files() -> dict[tuple[int, int], int]:
        """The bytes on disk of each open file; a temporary file may have no name, so it is known by its number."""
        found = {}
        for number in os.listdir("/proc/self/fd"):
            with suppress(OSError):  # the descriptor with which the folder was listed
                status = os.fstat(int(number))
                if stat.S_ISREG(status.st_mode):
                    found[status.st_dev, status.st_ino] = status.st_blocks * 512
        return found

    def disk() -> int:
        return sum(size for file, size in files().items() if file not in before)

    before = files()
    held = Spool(Memory(megabyte), Disk(ROOMY), megabyte, limit)
    most = written = taken = 0
    while written < 100 * megabyte:
        held.write(bytes([written // BLOCK % 251]) * BLOCK)
        written += BLOCK
        while len(held) > 8 * megabyte:
            data = held.read()
            assert data == bytes([taken // BLOCK % 251]) * len(data)
            taken += len(data)
        if written % megabyte == 0:
            most = max(most, disk())
    assert written - taken == len(held)
    held.close()
    assert disk() == 0
    assert 0 < most <= 40 * megabyte
