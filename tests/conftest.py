"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# A machine may be busy, and the first example compiles a kernel. The same examples each time: what
# a change breaks is then seen with that change. `--hypothesis-profile random` looks for others.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("random", deadline=None, print_blob=True)
settings.load_profile("fixed")
