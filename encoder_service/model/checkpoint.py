"""A trained model in one file: weights, and everything one must know to use and to trust them.

The file is safetensors. Its header carries one text entry, ``hashlens``: canonical JSON with the
fields of `Checkpoint` and a format version. `docs/training.md` describes it for other readers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from encoder_service.model.network import HashNet
from encoder_service.preprocess import Preprocessing
from hashlens.errors import InvalidInputError

FORMAT_VERSION = 1
"""Version of the metadata this module writes and reads."""

HEADER_KEY = "hashlens"
"""The entry of the safetensors header that holds the metadata."""

_FIELD = "checkpoint"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model and what is known about it."""

    network: HashNet
    """In evaluation mode, on the CPU."""
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    """Names of the classes it was trained on, in the order of the classifier's outputs."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """How it was trained: every setting by name."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What was measured after training; each name says by which protocol."""
    data_licence: str = ""
    """Licence and source of the data it was trained on."""
    model_id: str = field(init=False)
    """Hex, 32 characters: hash of weights, preprocessing and architecture, see `model_id_of`."""

    def __post_init__(self) -> None:
        if len(self.classes) != self.network.n_classes:
            raise InvalidInputError(
                f"the network tells {self.network.n_classes} classes apart, but "
                f"{len(self.classes)} are named.",
                field="classes",
            )
        try:
            "".join(self.classes).encode()
        except UnicodeEncodeError as error:
            raise InvalidInputError(
                "a class name is not valid UTF-8, and could not be sent. Rename it.",
                field="classes",
            ) from error
        self.network.eval()
        object.__setattr__(self, "model_id", model_id_of(self.network, self.preprocessing))

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self.network.backbone_name

    @property
    def n_bits(self) -> int:
        """Code length, in bits."""
        return self.network.n_bits

    @property
    def dim(self) -> int:
        """Width of F7."""
        return self.network.dim

    def describe(self) -> dict[str, Any]:
        """Return everything but the weights, as it is stored."""
        return {
            "format_version": FORMAT_VERSION,
            "model_id": self.model_id,
            **_architecture(self.network),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_json(),
            "recipe": dict(self.recipe),
            "metrics": dict(self.metrics),
            "data_licence": self.data_licence,
        }


def model_id_of(network: HashNet, preprocessing: Preprocessing) -> str:
    """Hash what decides an embedding: weights, preprocessing and architecture.

    Metrics, recipe, class names and licence do not enter, so they can be corrected later without
    making every stored embedding foreign.

    Returns
    -------
    str
        The first 16 bytes of SHA-256, as 32 hex characters.
    """
    digest = hashlib.sha256()

    def add(part: bytes) -> None:
        # Lengths keep neighbouring parts from running into each other.
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)

    add(b"hashlens model 1")
    add(canonical_json(_architecture(network)))
    add(canonical_json(preprocessing.to_json()))
    for name, tensor in sorted(network.state_dict().items()):
        values = tensor.detach().cpu().contiguous().numpy()
        little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
        add(name.encode())
        add(little_endian.dtype.str.encode())
        add(canonical_json(list(values.shape)))
        add(little_endian.tobytes())
    return digest.digest()[:16].hex()


def canonical_json(value: Any) -> bytes:
    """Write JSON in the one form that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint; the same checkpoint always gives the same bytes.

    Parameters
    ----------
    checkpoint
        What to write.
    path
        Where; replaced in one step if it exists.

    Raises
    ------
    OSError
        The disk is full, or not writable. What was there before still is.
    """
    metadata = {HEADER_KEY: canonical_json(checkpoint.describe()).decode()}
    state = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in checkpoint.network.state_dict().items()
    }
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(safetensors.torch.save(state, metadata=metadata))
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"the checkpoint: {error.strerror}", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def default_checkpoint_path() -> Path:
    """Return the checkpoint that comes with the package: 48 bits, Fashion-MNIST."""
    return Path(
        str(
            resources.files("encoder_service")
            / "checkpoints"
            / "fashion-mnist-resnet9-48.safetensors"
        )
    )


def load_checkpoint(path: Path, *, sha256: str = "") -> Checkpoint:
    """Read a checkpoint.

    Nothing in the file is executed: pickled checkpoints, which could be, are refused.

    Parameters
    ----------
    path
        A file `save_checkpoint` wrote.
    sha256
        SHA-256 that the file must have, 64 hex digits; empty: any. The bytes that are hashed are
        those that are used.

    Returns
    -------
    Checkpoint
        On the CPU, in evaluation mode.

    Raises
    ------
    InvalidInputError
        No such file, another one than `sha256` says, not a Hashlens checkpoint, of an unknown
        version, or its tensors are not those of the architecture it names.
    """
    plain, state = _read(path, sha256)
    try:
        preprocessing = Preprocessing.from_json(plain["preprocessing"])
        classes = tuple(str(name) for name in plain["classes"])
        with torch.device("meta"):
            network = HashNet(
                str(plain["backbone"]), int(plain["n_bits"]), len(classes), plain["hash_norm"]
            )
        recipe = dict(plain["recipe"])
        metrics = {name: _finite(value) for name, value in dict(plain["metrics"]).items()}
        data_licence, stated_id = str(plain["data_licence"]), str(plain["model_id"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(
            f"{path}: its metadata is incomplete: {error!r}. Export the checkpoint again.",
            field=_FIELD,
        ) from error
    _check_tensors(path, network, state)
    # Copied, not assigned: the file's tensors may lie unaligned, and kernels round by that.
    network.to_empty(device="cpu")
    network.load_state_dict(state)
    checkpoint = Checkpoint(network, preprocessing, classes, recipe, metrics, data_licence)
    if checkpoint.model_id != stated_id:
        raise InvalidInputError(
            f"{path}: its contents hash to {checkpoint.model_id}, but it says {stated_id}: the "
            "file is damaged or was changed. Get it again.",
            field=_FIELD,
        )
    return checkpoint


def read_metadata(path: Path) -> dict[str, Any]:
    """Read what a checkpoint says about itself, without its weights.

    Raises
    ------
    InvalidInputError
        No such file, not a Hashlens checkpoint, or of an unknown version.
    """
    return _read(path, "")[0]


def _read(path: Path, sha256: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a file's metadata and tensors, both from the very bytes that were hashed."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read: {error.strerror}.", field=_FIELD
        ) from error
    if sha256 and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise InvalidInputError(
            f"{path}: its SHA-256 is {found}, not the {sha256.lower()} that was asked for: it is "
            "another file, or somebody has changed it. Get it again from where you trust it.",
            field=_FIELD,
        )
    try:
        state = safetensors.torch.load(data)
        n_header_bytes = int.from_bytes(data[:8], "little")
        plain = json.loads(json.loads(data[8 : 8 + n_header_bytes])["__metadata__"][HEADER_KEY])
        version = plain["format_version"]
    except safetensors.SafetensorError as error:
        # Only now: a safetensors file begins with a length, which may look like either of these.
        if data.startswith((b"PK", b"\x80")):
            raise InvalidInputError(
                f"{path}: this is a pickled PyTorch file. Loading one may run code hidden in it, "
                "so Hashlens reads safetensors only: convert it where you trust it.",
                field=_FIELD,
            ) from error
        raise InvalidInputError(
            f"{path}: not a complete safetensors file ({error}).", field=_FIELD
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: a safetensors file, but without Hashlens metadata. Use a file that "
            "`hashlens train` wrote.",
            field=_FIELD,
        ) from error
    if version != FORMAT_VERSION:
        raise InvalidInputError(
            f"{path}: format version {version!r}; this Hashlens reads version {FORMAT_VERSION}. "
            "Use the Hashlens that wrote it, or a newer one.",
            field=_FIELD,
        )
    assert isinstance(plain, dict)
    return plain, state


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a metric is {number}")
    return number


def _architecture(network: HashNet) -> dict[str, Any]:
    return {
        "backbone": network.backbone_name,
        "n_bits": network.n_bits,
        "hash_norm": network.hash_norm_name,
    }


def _check_tensors(path: Path, network: HashNet, state: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with the architecture; refuse NaN and infinity."""
    expected = network.state_dict()
    if missing := sorted(expected.keys() - state.keys()):
        raise InvalidInputError(
            f"{path}: {len(missing)} tensors are missing, {missing[0]} first.", field=_FIELD
        )
    if extra := sorted(state.keys() - expected.keys()):
        raise InvalidInputError(
            f"{path}: {len(extra)} tensors do not belong to it, {extra[0]} first.", field=_FIELD
        )
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise InvalidInputError(
                f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, the architecture has "
                f"{wanted.dtype} {tuple(wanted.shape)}.",
                field=_FIELD,
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidInputError(f"{path}: {name} holds NaN or infinity.", field=_FIELD)
