"""What all tests share."""

import os

from hypothesis import HealthCheck, settings

# How long an example takes, or to make one, says nothing here: the machine that runs the tests may be busy with others.
# Elsewhere each run tries new examples; in CI one that is found by chance would fail a change that has no part in it.
settings.register_profile(
    "gmux", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ
)
settings.load_profile("gmux")
