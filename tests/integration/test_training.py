"""`hashlens train` as processes: killed, interrupted, without room, two at once; and learning."""

from __future__ import annotations

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from encoder_service.data.config import DataConfig
from encoder_service.data.images import load_images
from encoder_service.data.source import open_split
from encoder_service.data.types import Split
from encoder_service.evaluation.encodings import Encodings
from encoder_service.evaluation.evaluate import evaluate_encodings
from encoder_service.evaluation.local import encode_images
from encoder_service.model.checkpoint import Checkpoint, load_checkpoint
from encoder_service.training.fit import StepReport
from encoder_service.training.history import EpochReport
from encoder_service.training.recipe import make_recipe, make_train_config
from encoder_service.training.run import make_network, make_preprocessing, train_model
from encoder_service.training.state import load_state, state_path
from hashlens.cli.demo_data import load_demo_images
from tests.support.ports import held_port
from tests.support.services import wait_until
from tests.support.training import SMALL_OPTIONS, Quiet, run_train
from tests.unit.encoder.conftest import write_idx, write_small_fashion_mnist

# A shell has SIGINT ignored by what it starts in the background, these tests perhaps.
MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from hashlens.cli.main import main
main()
"""
# Rests after each step of the second epoch, so that a test has the time to disturb it there.
RESTING = """
import time
from encoder_service.training import run

save = run.save_state

def save_and_rest(state, path):
    save(state, path)
    if state["trainer"]["step"] > PER_EPOCH:
        time.sleep(1)

run.save_state = save_and_rest
"""
HASHLENS = [sys.executable, "-c", MAIN]
ENDS_S = 120
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "COLUMNS": "200"}

N_IMAGES, PER_EPOCH = 200, 20
"""Of 200 images 40 are held out; eight go into a step."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_small_fashion_mnist(folder, N_IMAGES, 40)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint and the log of a training that nothing happened to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("undisturbed")
    result = run_train(data, *outputs(folder))
    assert result.exit_code == 0, result.output
    return folder


def outputs(folder: Path) -> list[str]:
    return ["--output", str(folder / "model.safetensors"), "--log", str(folder / "log.csv")]


def command(data: Path, folder: Path, *arguments: str) -> list[str]:
    return [*HASHLENS, "train", "--data", str(data), *outputs(folder), *SMALL_OPTIONS, *arguments]


@contextmanager
def training(data: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A training's process that stores its state after every step; it does not outlive the test."""
    _, _, main, *arguments = command(data, folder, "--save-every-s", "0")
    process = subprocess.Popen(
        [sys.executable, "-c", f"PER_EPOCH = {PER_EPOCH}\n{RESTING}{main}", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(ENDS_S)
        assert process.stderr is not None
        process.stderr.close()


def into_second_epoch(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait for a state of the second epoch, begun and not done."""
    wait_until(
        lambda: (folder / "log.csv").exists() or process.poll() is not None,
        within_s=ENDS_S,
        what="an epoch",
    )
    wait_until(
        lambda: process.poll() is not None or stored_step(folder) > PER_EPOCH,
        within_s=ENDS_S,
        what="a step of the next",
    )
    assert process.poll() is None, "it ended too early"


def stored_step(folder: Path, fingerprint: dict[str, object] | None = None) -> int:
    state = load_state(state_path(folder / "model.safetensors"), fingerprint or {})
    assert state is not None
    step: int = state["trainer"]["step"]
    return step


def log_of(folder: Path) -> list[dict[str, str]]:
    """Return the log's lines, but for what a clock measured."""
    with (folder / "log.csv").open(newline="") as file:
        return [
            {name: value for name, value in line.items() if "_s" not in name and name != "seconds"}
            for line in csv.DictReader(file)
        ]


def assert_same_result(folder: Path, undisturbed: Path) -> None:
    ours, theirs = (load_checkpoint(f / "model.safetensors") for f in (folder, undisturbed))
    assert ours.model_id == theirs.model_id
    assert ours.metrics == theirs.metrics
    for name, tensor in theirs.network.state_dict().items():
        assert torch.equal(ours.network.state_dict()[name], tensor), name
    assert log_of(folder) == log_of(undisturbed)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "log.csv"}


# --- interrupted ---


def test_killed_in_the_middle_it_comes_to_the_same(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with training(data, tmp_path) as process:
        into_second_epoch(tmp_path, process)
        process.kill()
        process.wait(ENDS_S)
    assert PER_EPOCH < stored_step(tmp_path) < 2 * PER_EPOCH
    assert not (tmp_path / "model.safetensors").exists()

    again = subprocess.run(
        command(data, tmp_path),
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        env=ENVIRONMENT,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert "going on after step" in again.stderr
    assert_same_result(tmp_path, undisturbed)


def test_ctrl_c_ends_it_at_once_and_it_goes_on_later(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    with training(data, tmp_path) as process:
        into_second_epoch(tmp_path, process)
        began_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=ENDS_S)
        assert time.monotonic() - began_s < 30
    assert process.returncode == 128 + signal.SIGINT
    assert said.rstrip().endswith("interrupted")
    assert "Traceback" not in said
    assert stored_step(tmp_path) < 2 * PER_EPOCH
    assert not list(tmp_path.glob("*.partial"))

    result = run_train(data, *outputs(tmp_path))
    assert result.exit_code == 0, result.output
    assert_same_result(tmp_path, undisturbed)


# --- no room ---


@contextmanager
def files_of_at_most(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files, given to the process, stands for the disk's end."""
    state = state_path(tmp_path / "model.safetensors")
    with pytest.raises(KeyboardInterrupt):
        run_until(data, tmp_path, undisturbed, PER_EPOCH + 3)
    before = state.read_bytes()
    with files_of_at_most(1 << 20):
        full = subprocess.run(
            command(data, tmp_path),
            capture_output=True,
            text=True,
            timeout=ENDS_S,
            env=ENVIRONMENT,
            check=False,
        )
    assert full.returncode == 1, full.stderr
    assert full.stderr.splitlines()[-1] == (f"Error: {state}: the training's state: File too large")
    assert "Traceback" not in full.stderr
    assert state.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {state.name, "log.csv"}

    result = run_train(data, *outputs(tmp_path))
    assert result.exit_code == 0, result.output
    assert_same_result(tmp_path, undisturbed)


def test_no_room_for_the_checkpoint(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """The state of the last step is kept, and the older checkpoint is not touched."""
    older = tmp_path / "model.safetensors"
    older.write_bytes(b"older")
    state = state_path(older)
    size = (undisturbed / older.name).stat().st_size
    config = make_train_config(**recipe_of(undisturbed), data=data, output=older, n_threads=1)

    class Filling(Quiet):
        """The room goes when the last state is written."""

        def epoch(self, report: EpochReport) -> None:
            if report.epoch == 2:
                room.enter_context(files_of_at_most(size // 2))

    with ExitStack() as room, pytest.raises(OSError, match="the checkpoint: File too large"):
        train_model(config, Filling())
    assert older.read_bytes() == b"older"
    assert {path.name for path in tmp_path.iterdir()} == {older.name, state.name}
    checkpoint = train_model(config, Quiet())
    assert checkpoint.model_id == load_checkpoint(undisturbed / older.name).model_id
    assert not state.exists()


def run_until(data: Path, folder: Path, like: Path, step: int) -> None:
    """Train as `like` was, in this process, with a state after every step; stop after `step`."""

    class Stopping(Quiet):
        def step(self, report: StepReport) -> None:
            # The state of this step is not stored yet: it goes on after the one before.
            if report.step == step:
                raise KeyboardInterrupt

    config = make_train_config(
        **recipe_of(like),
        data=data,
        output=folder / "model.safetensors",
        log=folder / "log.csv",
        n_threads=1,
        save_every_s=0.0,
    )
    train_model(config, Stopping())


def recipe_of(folder: Path) -> dict[str, Any]:
    """Return the recipe that a checkpoint was trained by."""
    return dict(load_checkpoint(folder / "model.safetensors").recipe)


# --- several processes ---

_RANK = """
import os, sys
from pathlib import Path
import safetensors.torch
from encoder_service.model.checkpoint import load_checkpoint
from encoder_service.training.recipe import make_recipe, make_train_config
from encoder_service.training.run import train_model
from tests.support.training import Quiet
data, folder, like = map(Path, sys.argv[1:])
recipe = load_checkpoint(like / "model.safetensors").recipe
config = make_train_config(**recipe, data=data, output=folder / "out", n_threads=1, evaluate=False)
network = train_model(config, Quiet()).network
weights = {name: p.detach().contiguous() for name, p in network.named_parameters()}
safetensors.torch.save_file(weights, folder / ("rank" + os.environ["RANK"]))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run two processes that train together."""
    with held_port() as port:
        return subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
                *("--master-addr", "127.0.0.1", "--master-port", str(port), "--no-python", "--"),
                *arguments,
            ],
            capture_output=True,
            text=True,
            timeout=ENDS_S,
            env=ENVIRONMENT,
            check=False,
        )


def test_two_processes_do_what_one_does(data: Path, tmp_path: Path) -> None:
    """The same batches, each shared by two.

    On CPUs each process would normalise over its own half of a batch, and draw its own
    augmentation, so that results are alike and not equal. Without both, they differ by rounding.
    """
    plain = ["--freeze", "all", "--hash-norm", "none", "--augment", "none", "--recipe", "csq"]
    for name in ("together", "alone"):
        (tmp_path / name).mkdir()
    done = torchrun(*command(data, tmp_path / "together", *plain))
    assert done.returncode == 0, done.stderr
    result = run_train(data, *outputs(tmp_path / "alone"), *plain)
    assert result.exit_code == 0, result.output

    left = {path.name for path in (tmp_path / "together").iterdir()}
    assert left == {"model.safetensors", "log.csv"}
    # One of them reports.
    assert done.stdout.count("model_id") == 1
    assert done.stderr.count("epoch   2") == 1
    ours, theirs = (
        load_checkpoint(tmp_path / n / "model.safetensors") for n in ("together", "alone")
    )
    assert ours.recipe == theirs.recipe
    first = make_network(make_recipe(**recipe_of(tmp_path / "alone")), 10).hash_layer.weight
    assert not torch.allclose(theirs.network.hash_layer.weight, first, atol=1e-3)
    for name, tensor in theirs.network.state_dict().items():
        torch.testing.assert_close(ours.network.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)
    for line, other in zip(log_of(tmp_path / "together"), log_of(tmp_path / "alone"), strict=True):
        for name, value in line.items():
            assert float(value) == pytest.approx(float(other[name]), rel=1e-3, abs=1e-3), name


def test_both_processes_have_the_same_weights(
    data: Path, undisturbed: Path, tmp_path: Path
) -> None:
    done = torchrun(sys.executable, "-c", _RANK, str(data), str(tmp_path), str(undisturbed))
    assert done.returncode == 0, done.stderr
    first, second = (safetensors.torch.load_file(tmp_path / f"rank{rank}") for rank in (0, 1))
    served = load_checkpoint(tmp_path / "out").network.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, served[name]), name


# --- does it learn? ---


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_images_are_enough_to_learn_from(tmp_path: Path) -> None:
    """The default recipe, on garments: far above chance, and above LSH on the untrained network."""
    images, labels, _ = load_demo_images()
    rows = np.random.default_rng(0).permutation(len(images))
    for prefix, part in (("train", rows[:1000]), ("t10k", rows[1000:1400])):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[part])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels[part])
    config = make_train_config(
        data=tmp_path,
        output=tmp_path / "model.safetensors",
        epochs=5,
        batch_size=50,
        device="cpu",
        # Threads that wait for each other on a busy machine cost more than they bring.
        n_threads=1,
    )
    checkpoint = train_model(config, Quiet())
    learned = checkpoint.metrics
    assert learned["test_accuracy"] > 0.65
    assert learned["lin2015_coarse_precision_at_10"] > 0.6
    assert learned["lin2015_two_stage_precision_at_10"] > 0.65
    assert learned["database_distinct_codes"] > 100

    torch.manual_seed(config.seed)
    classes = checkpoint.classes
    untrained = Checkpoint(make_network(config, len(classes)), make_preprocessing(config), classes)

    def encode(split: Split) -> Encodings:
        source = open_split(DataConfig(data=tmp_path), split)
        pixels = load_images(source, untrained.preprocessing)
        return encode_images(untrained, pixels, device="cpu")

    floor = evaluate_encodings(
        encode("train"),
        encode("test"),
        protocol="lin2015",
        classes=classes,
        rankings=["coarse", "lsh"],
    ).rankings
    lsh = floor["lsh"]
    assert lsh.precision_at_10 is not None
    assert learned["lin2015_coarse_precision_at_10"] > lsh.precision_at_10 + 0.1
    assert learned["lin2015_coarse_map_full"] > lsh.map_full + 0.2
    # Its own bits, untrained, say nothing.
    assert floor["coarse"].precision_at_10 == pytest.approx(0.1, abs=0.05)
