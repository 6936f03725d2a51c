"""When the licence to put requests behind one another is there, and when it is tried for again."""

from __future__ import annotations

from gmux.licence import FIRST_PAUSE, LONGEST_PAUSE, TRUSTED_AFTER, Licence


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_licence_that_needs_a_probe_is_due_at_once_and_one_that_needs_none_is_there():
    assert (Licence(False).is_granted, Licence(False).is_due) == (False, True)
    assert (Licence(True).is_granted, Licence(True).is_due) == (True, False)


def test_refused_licence_is_due_after_a_pause_that_doubles_up_to_the_longest():
    clock = Clock()
    licence = Licence(False, clock)
    pauses = []
    for _ in range(10):
        pause = licence.refuse()
        pauses.append(pause)
        clock.now += pause - 1
        assert not licence.is_due
        clock.now += 1
        assert licence.is_due
    assert pauses[:3] == [FIRST_PAUSE, 2 * FIRST_PAUSE, 4 * FIRST_PAUSE]
    assert pauses[-1] == LONGEST_PAUSE


def test_licence_taken_away_soon_is_tried_for_later_each_time():
    clock = Clock()
    licence = Licence(True, clock)
    assert licence.refuse() == FIRST_PAUSE
    clock.now += FIRST_PAUSE
    licence.grant()
    assert licence.is_granted
    assert not licence.is_due
    clock.now += TRUSTED_AFTER - 1
    assert licence.refuse() == 2 * FIRST_PAUSE
    assert not licence.is_granted


def test_refusals_are_forgotten_after_a_licence_has_held_for_long():
    clock = Clock()
    licence = Licence(False, clock)
    for _ in range(4):
        licence.refuse()
    licence.grant()
    clock.now += TRUSTED_AFTER
    assert licence.refuse() == FIRST_PAUSE
