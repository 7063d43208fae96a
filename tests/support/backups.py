"""`hashlens backup` and `hashlens restore` in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from search_service.storage import failpoints

_COMMANDS = """
from hashlens.cli.main import main
from search_service.backup.commands import backup, restore
main.add_command(backup)
main.add_command(restore)
main(prog_name="hashlens")
"""
_LONGEST_S = 60


def hashlens(*arguments: str | Path, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command, whether or not the package was installed with it."""
    return subprocess.run(
        [sys.executable, "-c", _COMMANDS, *map(str, arguments)],
        env={**os.environ, failpoints.VARIABLE: failpoint},
        capture_output=True,
        text=True,
        timeout=_LONGEST_S,
        check=False,
    )
