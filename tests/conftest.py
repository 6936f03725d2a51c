"""What all tests share."""

from hypothesis import settings

# How long an example takes says nothing here: the machine that runs the tests may be busy with others.
settings.register_profile("gmux", deadline=None)
settings.load_profile("gmux")
