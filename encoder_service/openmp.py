"""How OpenMP's threads wait for each other; it reads this when torch is loaded."""

from __future__ import annotations

import os


def set_up() -> None:
    """Have them sleep rather than spin, unless the environment says otherwise.

    Spinning, they would take the CPU from whatever else runs here, such as the other service. But a
    tenth of a millisecond is not worth going to sleep for: a small network's layers take little
    longer. Passes side by side have one thread each, and spin for nobody.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
