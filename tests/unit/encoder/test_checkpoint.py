from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from encoder_service.model.checkpoint import (
    HEADER_KEY,
    Checkpoint,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from hashlens.errors import InvalidInputError
from tests.unit.encoder.conftest import make_checkpoint


def test_round_trip(checkpoint: Checkpoint, checkpoint_file: Path) -> None:
    loaded = load_checkpoint(checkpoint_file)
    assert loaded.describe() == checkpoint.describe()
    assert loaded.model_id == checkpoint.model_id
    assert (loaded.backbone, loaded.n_bits, loaded.dim) == ("mobilenet_v3_small", 20, 1024)
    assert loaded.classes == ("cat", "dog", "Ähre")
    assert not loaded.network.training
    images = torch.randn(2, 3, 32, 32)
    for ours, theirs in zip(loaded.network(images), checkpoint.network(images), strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_checkpoint_gives_the_same_bytes(checkpoint_file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.safetensors"
    save_checkpoint(load_checkpoint(checkpoint_file), again)
    assert again.read_bytes() == checkpoint_file.read_bytes()
    assert sorted(tmp_path.iterdir()) == [again, checkpoint_file]


def test_loading_leaves_the_random_generator_alone(checkpoint_file: Path) -> None:
    before = torch.random.get_rng_state()
    load_checkpoint(checkpoint_file)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- pinned by SHA-256 ---


def test_a_pinned_checkpoint_is_taken_and_another_one_is_not(checkpoint_file: Path) -> None:
    data = checkpoint_file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    for written in (sha256, sha256.upper()):
        assert load_checkpoint(checkpoint_file, sha256=written).n_bits == 20
    # Also what its own checksum does not cover, such as the licence.
    changed = data.replace(b"licence", b"license", 1)
    assert changed != data
    checkpoint_file.write_bytes(changed)
    with pytest.raises(InvalidInputError, match="somebody has changed it") as caught:
        load_checkpoint(checkpoint_file, sha256=sha256)
    assert sha256 in str(caught.value)
    assert hashlib.sha256(changed).hexdigest() in str(caught.value)
    assert caught.value.field == "checkpoint"


def test_what_is_hashed_is_what_is_used(checkpoint_file: Path, tmp_path: Path) -> None:
    """A pipe can be read only once."""
    data = checkpoint_file.read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    loaded = load_checkpoint(pipe, sha256=hashlib.sha256(data).hexdigest())
    writer.join(10)
    assert loaded.model_id == load_checkpoint(checkpoint_file).model_id


# --- model_id ---


def test_model_id_ignores_what_does_not_change_an_embedding(checkpoint: Checkpoint) -> None:
    other = replace(checkpoint, metrics={}, recipe={}, data_licence="?", classes=("a", "b", "c"))
    assert other.model_id == checkpoint.model_id
    assert len(other.model_id) == 32
    assert int(other.model_id, 16) >= 0


def test_model_id_ignores_memory_layout(checkpoint: Checkpoint) -> None:
    network = copy.deepcopy(checkpoint.network).to(memory_format=torch.channels_last)
    assert replace(checkpoint, network=network).model_id == checkpoint.model_id


def test_model_id_follows_every_weight(checkpoint: Checkpoint) -> None:
    state = checkpoint.network.state_dict()
    for name, tensor in [*list(state.items())[::23], *list(state.items())[-9:]]:
        network = copy.deepcopy(checkpoint.network)
        with torch.no_grad():
            changed = network.state_dict()[name].view(-1)
            if tensor.is_floating_point():
                changed[-1] = torch.nextafter(changed[-1], torch.tensor(9.0))
            else:
                changed[-1] += 1
        assert replace(checkpoint, network=network).model_id != checkpoint.model_id, name


@pytest.mark.parametrize(
    "change",
    [
        {"resize": 33},
        {"interpolation": "bicubic"},
        {"mean": (0.0, 0.0, 0.0)},
        {"jpeg_draft": True},
    ],
)
def test_model_id_follows_the_preprocessing(checkpoint: Checkpoint, change: dict[str, Any]) -> None:
    preprocessing = replace(checkpoint.preprocessing, **change)
    assert replace(checkpoint, preprocessing=preprocessing).model_id != checkpoint.model_id


def test_model_id_follows_the_code_length() -> None:
    assert make_checkpoint(n_bits=20).model_id != make_checkpoint(n_bits=21).model_id


def test_model_id_is_pinned() -> None:
    """Golden value: a change here makes every stored embedding foreign."""
    network = HashNet("mobilenet_v3_small", 8, 2)
    with torch.no_grad():
        for position, tensor in enumerate(network.state_dict().values()):
            tensor.fill_(position)
    assert Checkpoint(network, Preprocessing(), ("a", "b")).model_id == GOLDEN_MODEL_ID


GOLDEN_MODEL_ID = "82c389d52056e7f71dfabedd5026a65a"


def test_class_names_must_fit(checkpoint: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match="3 classes apart, but 2 are named"):
        replace(checkpoint, classes=("a", "b"))


# --- what is refused ---


def rewrite(
    path: Path,
    tensors: Callable[[dict[str, torch.Tensor]], None] = lambda state: None,
    metadata: Callable[[dict[str, Any]], None] = lambda plain: None,
) -> None:
    """Change a checkpoint file in place."""
    plain = read_metadata(path)
    state = safetensors.torch.load_file(path)
    tensors(state)
    metadata(plain)
    path.write_bytes(safetensors.torch.save(state, {HEADER_KEY: json.dumps(plain)}))


def refused(path: Path, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match) as caught:
        load_checkpoint(path)
    assert caught.value.field == "checkpoint"


def test_missing_file(tmp_path: Path) -> None:
    refused(tmp_path / "none", "cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


def test_pickles_are_refused_without_being_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    zipped, plain, legacy = (tmp_path / name for name in ("zipped", "plain", "legacy"))
    torch.save({"trap": Trap()}, zipped)
    torch.save({"trap": Trap()}, legacy, _use_new_zipfile_serialization=False)
    plain.write_bytes(pickle.dumps(Trap()))
    for path in (zipped, plain, legacy):
        refused(path, "pickled PyTorch file")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"hello", bytes(100), b"\xff" * 64, struct.pack("<Q", 2) + b"{}"]
)
def test_not_safetensors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    refused(path, "not a complete safetensors file|without Hashlens metadata")


def test_somebody_elses_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for metadata in (None, {"format": "pt"}, {HEADER_KEY: "no json"}, {HEADER_KEY: "[]"}):
        path.write_bytes(safetensors.torch.save({"w": torch.zeros(2)}, metadata))
        refused(path, "without Hashlens metadata")


def test_cut_short(checkpoint_file: Path) -> None:
    data = checkpoint_file.read_bytes()
    for length in (7, 100, len(data) // 2, len(data) - 1):
        checkpoint_file.write_bytes(data[:length])
        refused(checkpoint_file, "not a complete safetensors file|pickled")


def test_a_header_length_that_looks_like_a_pickle_is_none(checkpoint_file: Path) -> None:
    """The first byte is the low byte of the header's length, so it may be a pickle's 0x80."""
    rewrite(checkpoint_file)
    n_bytes = (0x80 - checkpoint_file.read_bytes()[0]) % 256
    rewrite(
        checkpoint_file, metadata=lambda plain: plain.update(data_licence="CC0" + "x" * n_bytes)
    )
    assert checkpoint_file.read_bytes()[0] == 0x80
    assert load_checkpoint(checkpoint_file).n_bits == 20


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_unknown_version(checkpoint_file: Path, version: object) -> None:
    rewrite(checkpoint_file, metadata=lambda plain: plain.update(format_version=version))
    refused(checkpoint_file, "this Hashlens reads version 1")


@pytest.mark.parametrize(
    "key", ["backbone", "n_bits", "hash_norm", "classes", "preprocessing", "metrics", "model_id"]
)
def test_incomplete_metadata(checkpoint_file: Path, key: str) -> None:
    rewrite(checkpoint_file, metadata=lambda plain: plain.pop(key))
    refused(checkpoint_file, f"incomplete: KeyError\\('{key}'\\)")


def test_unknown_backbone(checkpoint_file: Path) -> None:
    rewrite(checkpoint_file, metadata=lambda plain: plain.update(backbone="vgg19"))
    with pytest.raises(InvalidInputError, match="no backbone 'vgg19'"):
        load_checkpoint(checkpoint_file)


def test_wrong_tensors(checkpoint_file: Path) -> None:
    whole = checkpoint_file.read_bytes()

    def again(match: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        checkpoint_file.write_bytes(whole)
        rewrite(checkpoint_file, tensors=lambda state: [change(state), None][1])
        refused(checkpoint_file, match)

    again("1 tensors are missing, hash_layer.bias", lambda s: s.pop("hash_layer.bias"))
    again("1 tensors do not belong", lambda s: s.update(extra=torch.zeros(1)))
    again(
        "hash_layer.bias is torch.float32", lambda s: s.update({"hash_layer.bias": torch.ones(9)})
    )
    again(
        "hash_layer.bias is torch.float64",
        lambda s: s.update({"hash_layer.bias": torch.ones(20, dtype=torch.float64)}),
    )
    again("hash_layer.bias holds NaN", lambda s: s["hash_layer.bias"].fill_(float("nan")))
    again("it says", lambda s: s["hash_layer.bias"].add_(1))


def test_changed_architecture(checkpoint_file: Path) -> None:
    rewrite(checkpoint_file, metadata=lambda plain: plain.update(n_bits=24))
    refused(checkpoint_file, "the architecture has")


def test_changed_preprocessing_is_found_out(checkpoint_file: Path) -> None:
    rewrite(checkpoint_file, metadata=lambda plain: plain["preprocessing"].update(resize=64))
    refused(checkpoint_file, "damaged or was changed")


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_damaged_byte_is_found(
    checkpoint: Checkpoint, checkpoint_file: Path, place: float, flip: int
) -> None:
    data = bytearray(checkpoint_file.read_bytes())
    data[int(place * len(data))] ^= flip
    damaged = checkpoint_file.with_name("damaged")
    damaged.write_bytes(data)
    try:
        loaded = load_checkpoint(damaged)
    except InvalidInputError:
        return
    # What is not hashed may change: recipe, metrics, class names, licence.
    assert loaded.model_id == checkpoint.model_id
