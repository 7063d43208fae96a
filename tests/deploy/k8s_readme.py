"""Does what the READMEs of deploy/k8s say, with a kubectl that only writes down."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.deploy.manifests import K8S

_KUBECTL = '''#!{python}
"""Writes down the secrets that it is told to make."""
import json, os, sys
from pathlib import Path

arguments = sys.argv[1:]
if arguments[:1] == ["apply"]:
    sys.exit()
assert arguments[:5] == ["-n", "hashlens", "create", "secret", "generic"], arguments
values = {{}}
for argument in arguments[6:]:
    flag, _, rest = argument.partition("=")
    if flag == "--from-literal":
        key, _, value = rest.partition("=")
    else:
        assert flag == "--from-file", argument
        key, _, path = rest.rpartition("=")
        key, value = key or Path(path).name, Path(path).read_text()
    values[key] = value
place = Path(os.environ["SECRETS"], arguments[5])
assert not place.exists(), f"{{arguments[5]}} is made twice"
place.write_text(json.dumps(values))
'''


def blocks(readme: Path) -> list[str]:
    """Return a page's commands that make secrets."""
    found = re.findall(r"^```bash\n(.*?)^```", readme.read_text(), re.M | re.S)
    return [block for block in found if "create secret" in block]


@functools.cache
def secrets() -> dict[str, dict[str, str]]:
    """Run these commands of all pages; return the secrets with keys and values."""
    for tool in ("bash", "openssl", "sha256sum"):
        if shutil.which(tool) is None:
            pytest.skip(f"the commands of deploy/k8s/README.md need {tool}")
    with tempfile.TemporaryDirectory() as folder:
        place, commands = Path(folder, "secrets"), Path(folder, "bin")
        place.mkdir()
        commands.mkdir()
        kubectl = commands / "kubectl"
        kubectl.write_text(_KUBECTL.format(python=sys.executable))
        kubectl.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "SECRETS": str(place),
        }
        for page in (K8S / "README.md", *sorted(K8S.glob("components/*/README.md"))):
            for block in blocks(page):
                done = subprocess.run(
                    ["bash", "-eu", "-c", block],
                    cwd=folder,
                    env=environment,
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                assert done.returncode == 0, f"{page}: {done.stderr}"
        return {path.name: json.loads(path.read_text()) for path in place.iterdir()}
