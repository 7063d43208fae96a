"""Every code block of the README is run as it stands there, on free ports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from hashlens import Client
from tests.support.ports import held_port
from tests.support.services import START_S, STOP_S, wait_until

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.M | re.S)
DEMO, UP, COMMANDS, MODEL, KEEPING = (text for language, text in BLOCKS if language == "bash")
PYTHON, GRPC = (text for language, text in BLOCKS if language == "python")
STEP_S = 150.0


def run(command: list[str] | str, folder: Path, env: dict[str, str]) -> str:
    """Run a command or a line of shell and return what it printed."""
    done = subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=STEP_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pictures(images: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures that the README speaks of."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "pictures").mkdir()
    for i, data in enumerate(images[:60:2]):
        (folder / "pictures" / ("first.png" if i == 0 else f"p{i:02}.png")).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def env() -> Iterator[dict[str, str]]:
    """The environment that moves both services to free ports."""
    with held_port() as first, held_port() as second:
        encoder, search = (f"127.0.0.1:{port}" for port in (first, second))
        yield {
            **os.environ,
            "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}",
            "HASHLENS_ENCODER": encoder,
            "HASHLENS_ENCODER_LISTEN": encoder,
            "HASHLENS_SEARCH": search,
            "HASHLENS_SEARCH_LISTEN": search,
        }


@pytest.fixture(scope="module")
def up(pictures: Path, env: dict[str, str]) -> Iterator[None]:
    """The second block: `hashlens up`, ended as Ctrl-C does."""
    with (pictures / "up.log").open("w") as log:
        process = subprocess.Popen(
            f"exec {UP}", shell=True, cwd=pictures, env=env, stdout=log, stderr=log
        )
    try:
        with Client(env["HASHLENS_SEARCH"], env["HASHLENS_ENCODER"]) as client:
            wait_until(
                lambda: (
                    process.poll() is not None
                    or all(health.serving for health in client.health(deadline_s=1))
                ),
                within_s=START_S,
                what="both services serve",
            )
        assert process.poll() is None, (pictures / "up.log").read_text()
        yield
        process.send_signal(signal.SIGINT)
        assert process.wait(STOP_S) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(STOP_S)


def with_ports(code: str, env: dict[str, str]) -> str:
    return code.replace("127.0.0.1:50051", env["HASHLENS_ENCODER"]).replace(
        "127.0.0.1:50052", env["HASHLENS_SEARCH"]
    )


def test_there_is_no_block_that_nobody_runs() -> None:
    assert [language for language, _ in BLOCKS] == ["", *["bash"] * 4, "python", "python", "bash"]
    assert [line.split("#")[0].strip() for line in DEMO.splitlines()] == ["make demo", "make test"]


def test_the_two_commands(env: dict[str, str]) -> None:
    # This very run is what `make test` does; running it again would never end.
    assert "pytest" in run(["make", "--dry-run", "test"], ROOT, env)
    began_s = time.time()
    printed = run(["make", "demo"], ROOT, env)
    assert "Precision by label" in printed
    folder = ROOT / "build" / "demo"
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["precision_at_10"] >= 0.85
    assert summary["precision_at_100"] > 0.5
    assert summary["images"] >= 4000
    assert summary["queries"] >= 100
    stages = {"decode", "queue", "inference", "coarse", "fine", "whole_call"}
    assert stages <= set(summary["median_ms"])
    assert all(summary["median_ms"][stage] > 0 for stage in stages)
    for name in ("report.html", "summary.json"):
        assert (folder / name).stat().st_mtime >= began_s - 1
        assert name in printed.replace("\n", "")


def test_the_commands(up: None, pictures: Path, env: dict[str, str]) -> None:
    for line in COMMANDS.splitlines():
        run(line, pictures, env)
    assert "<html" in (pictures / "answer.html").read_text("utf-8").lower()


def test_keeping_it(up: None, pictures: Path, env: dict[str, str]) -> None:
    printed = "".join(run(line, pictures, env) for line in KEEPING.splitlines())
    assert (pictures / "backup" / "BACKUP.json").exists()
    assert "nothing differs" in printed
    assert printed.endswith("complete\n")


def test_a_model_of_ones_own(pictures: Path, env: dict[str, str]) -> None:
    for label in ("bright", "dark"):
        (pictures / "photos" / label).mkdir(parents=True)
    for i, path in enumerate(sorted((pictures / "pictures").glob("*.png"))):
        with Image.open(path) as image:
            shade = image.point(lambda value, odd=i % 2: value // 2 + 127 * odd)
            shade.save(pictures / "photos" / ("dark", "bright")[i % 2] / path.name)
    few = {
        "HASHLENS_TRAIN_BATCH_SIZE": "8",
        "HASHLENS_TRAIN_EPOCHS": "2",
        "HASHLENS_TRAIN_LEARNING_RATE": "0.01",
    }
    for line in MODEL.splitlines():
        run(line, pictures, {**env, **few})
    assert "<html" in (pictures / "photos.html").read_text("utf-8").lower()


def test_the_python_sessions(up: None, pictures: Path, env: dict[str, str]) -> None:
    printed = run([sys.executable, "-c", with_ports(PYTHON, env)], pictures, env)
    assert printed.startswith("first.png 0 0.00\n")
    assert "exact: True" in printed
    printed = run([sys.executable, "-c", with_ports(GRPC, env)], pictures, env)
    assert "('first.png', 0)" in printed
