"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A machine may be busy, and the first example compiles a kernel.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
