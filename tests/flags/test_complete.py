"""Every setting has a test of its effect, by name: a new one without it fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gmux.settings import SETTINGS

#: The blocks of code of the tests beside this file; two empty lines are between any two.
BLOCKS = [block for path in Path(__file__).parent.glob("test_*.py") for block in path.read_text().split("\n\n\n")]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_each_setting_has_a_test_that_gives_it_a_value(setting):
    """The name of a test begins with the setting's, and the flag or its value is in the test or its parameters."""
    named = [block for block in BLOCKS if re.search(rf"^def test_{setting.name}_", block, re.MULTILINE)]
    assert named, f"no test_{setting.name}_... in tests/flags"
    given = re.compile(rf'\b{setting.name}=(?!"")|"{setting.flag}"' + rf'|"{setting.short}"' * bool(setting.short))
    assert any(given.search(block) for block in named), f"no test_{setting.name}_... gives {setting.flag}"
