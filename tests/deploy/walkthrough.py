"""What the pages of deploy/k8s tell a new user to type, done with kubectl and a real API server."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.deploy.control_plane import ControlPlane
from tests.deploy.k8s_readme import blocks
from tests.deploy.manifests import K8S

_APPLY = re.compile(r"^kubectl apply -k .*$", re.MULTILINE)
_COMMAND_S = 120


def commands(folder: Path = K8S) -> list[str]:
    """Return the commands that make secrets, those that apply an overlay, and that they did it."""
    page = folder / "README.md"
    components = sorted(folder.glob("components/*/README.md"))
    secrets = [block for each in (page, *components) for block in blocks(each)]
    applied = _APPLY.findall(page.read_text())
    return [*secrets, *applied, *(each.replace(" apply ", " diff ") for each in applied)]


def walk(server: ControlPlane, kubectl: Path, folder: Path = K8S) -> list[str]:
    """Type all of it in an empty cluster; return what failed."""
    with TemporaryDirectory(prefix="hashlens-walk-") as name:
        place = Path(name)
        (place / "bin").mkdir()
        (place / "bin" / "kubectl").symlink_to(kubectl.resolve())
        (place / "deploy").symlink_to(folder.parent.resolve())
        server.kubeconfig(place / "kubeconfig")
        environment = {
            **os.environ,
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "KUBECONFIG": str(place / "kubeconfig"),
        }
        typed = commands(folder)
        for command in typed:
            done = subprocess.run(
                ["bash", "-eu", "-c", command],
                cwd=place,
                env=environment,
                capture_output=True,
                text=True,
                timeout=_COMMAND_S,
                check=False,
            )
            if done.returncode or "Warning" in done.stderr:
                last = command.strip().splitlines()[-1]
                return [f"{last}: {(done.stderr or done.stdout).strip()}"]
    print(f"the pages' {len(typed)} commands with kubectl: ok")
    return []
