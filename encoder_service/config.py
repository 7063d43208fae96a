"""What the encoder service can be told."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hashlens.config import setting
from hashlens.errors import InvalidInputError
from hashlens.rpc.server_config import ServerConfig

_SHA256 = re.compile("[0-9a-fA-F]{64}")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(ServerConfig):
    """Options of ``python -m encoder_service``."""

    listen: str = setting("127.0.0.1:50051", "Address and port to serve on; port 0 takes any.")
    checkpoint: Path | None = setting(
        None, "Checkpoint to serve, a safetensors file; the bundled one without."
    )
    checkpoint_sha256: str = setting(
        "", "SHA-256 that the checkpoint's file must have, or the service does not start."
    )
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a device.")
    feature_dtype: Literal["f16", "f32"] = setting(
        "f16", "Number format of features when a request does not say."
    )
    autocast: Literal["off", "bfloat16", "float16"] = setting(
        "off", "Number format of the model on CUDA; one setting for a whole collection."
    )
    compile: bool = setting(
        False, "Let torch.compile make code for the model; one setting for a whole collection."
    )
    n_threads: int = setting(0, "CPU threads of the model; 0: one per CPU.")
    n_decode_threads: int = setting(0, "Threads that decode images; 0: one for each CPU.")
    max_batch: int = setting(32, "Most images of one forward pass.")
    max_wait_ms: float = setting(2.0, "Longest an image waits for company, in milliseconds.")
    max_queue: int = setting(512, "Most images decoded or waiting; one more is refused.")
    max_batch_items: int = setting(256, "Most images of one EncodeBatch.")
    max_stream_window: int = setting(
        64, "Most images of one EncodeStream that are in the works or answered and not yet read."
    )
    max_stream_bytes: int = setting(
        32 * 2**20, "Most bytes of them; one more image may go beyond it."
    )
    stream_idle_s: float = setting(
        300.0,
        "A stream ends when it has nothing to do, or its answers are not read, for this long, in "
        "seconds.",
    )
    max_image_bytes: int = setting(20 * 2**20, "Largest image, in bytes.")
    max_image_pixels: int = setting(50_000_000, "Largest image, width times height.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_sha256 and not _SHA256.fullmatch(self.checkpoint_sha256):
            raise InvalidInputError(
                "checkpoint_sha256 is 64 hex digits, as sha256sum prints", field="checkpoint_sha256"
            )
        for name in ("n_threads", "n_decode_threads", "max_wait_ms"):
            if not getattr(self, name) >= 0:
                raise InvalidInputError(f"{name} is 0 or more", field=name)
        for name in ("max_image_bytes", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        for name in (
            *("max_batch", "max_queue", "max_batch_items"),
            *("max_stream_window", "max_stream_bytes"),
        ):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        if self.stream_idle_s <= 0:
            raise InvalidInputError("stream_idle_s is above 0", field="stream_idle_s")
        if self.max_queue < self.max_batch_items:
            raise InvalidInputError(
                f"max_queue ({self.max_queue}) must hold one EncodeBatch of max_batch_items "
                f"({self.max_batch_items}), or the largest would always be refused",
                field="max_queue",
            )
