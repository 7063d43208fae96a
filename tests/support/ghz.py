"""The scripts of deploy/ghz as a test runs them, and what kustomize makes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GHZ_FOLDER = ROOT / "deploy" / "ghz"
TOOLS = ROOT / ".tools" / "bin"
SCENARIOS = sorted(path.stem for path in (GHZ_FOLDER / "scenarios").glob("*.json"))
RUN_S = 120
TOKEN = "0123456789abcdef0123456789abcdef"


def tool(name: str) -> str | None:
    """Find a tool that ``make`` has installed, or that is there anyway."""
    installed = TOOLS / name
    return str(installed) if installed.exists() else shutil.which(name)


needs_ghz = pytest.mark.skipif(
    tool("ghz") is None, reason="ghz is not here: `make ghz` installs it with Go"
)
needs_kustomize = pytest.mark.skipif(
    tool("kustomize") is None, reason="kustomize is not here: `make kustomize` installs it with Go"
)


def environment(**others: str) -> dict[str, str]:
    """What a script sees: nothing of ours but what is said here."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HASHLENS_")}
    return {**kept, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **others}


def execute(*command: str | Path, **others: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        command,
        env=environment(**others),
        capture_output=True,
        text=True,
        timeout=RUN_S,
        check=False,
    )


def thresholds_file(folder: Path, scenario: str, shape: str, thresholds: dict[str, Any]) -> Path:
    path = folder / "thresholds.json"
    path.write_text(json.dumps({scenario: {shape: thresholds}}))
    return path


def rendered(folder: Path) -> list[dict[str, Any]]:
    kustomize = tool("kustomize")
    assert kustomize is not None
    ended = execute(kustomize, "build", folder)
    assert ended.returncode == 0, ended.stderr
    return list(yaml.safe_load_all(ended.stdout))


def job_of(objects: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, dict[str, str]]]:
    """Return the Job's pod, and the data of the ConfigMaps by their names."""
    (job,) = (item for item in objects if item["kind"] == "Job")
    maps = {
        item["metadata"]["name"]: item["data"] for item in objects if item["kind"] == "ConfigMap"
    }
    return job["spec"]["template"]["spec"], maps


def project(volume: dict[str, Any], maps: dict[str, dict[str, str]], to: Path) -> None:
    """Lay files out as the kubelet does: behind a link that it can swap."""
    version = to / "..2026"
    for source in volume["projected"]["sources"]:
        data = maps[source["configMap"]["name"]]
        items = source["configMap"].get("items") or [{"key": k, "path": k} for k in data]
        for item in items:
            path = version / item["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(data[item["key"]])
    (to / "..data").symlink_to(version.name)
    for entry in version.iterdir():
        (to / entry.name).symlink_to(Path("..data", entry.name))
