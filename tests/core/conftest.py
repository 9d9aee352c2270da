"""Settings of all property tests in this folder."""

from hypothesis import settings

# A loaded machine is not a failure.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
