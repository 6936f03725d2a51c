"""The deadline and the watch over the loop that the tests of the invariants have."""

from tests.invariants.conftest import _guarded as _guarded
