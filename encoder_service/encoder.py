"""Preprocessed images -> codes and features. No RPC, no asyncio: usable in a notebook.

checkpoint = load_checkpoint(default_checkpoint_path())
encoder = Encoder(checkpoint)
image = decode(path.read_bytes(), DecodeLimits())
encoded = encoder.encode(encoder.preprocessing(image)[np.newaxis])
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoder_service.model.checkpoint import Checkpoint
from encoder_service.model.network import HashOutput
from encoder_service.model.serving import served
from encoder_service.passes import agreeing_sizes, cut
from encoder_service.preprocess import Preprocessing
from hashlens import codes
from hashlens.cpus import usable_cpus
from hashlens.errors import InvalidInputError, LimitError, PreconditionError
from hashlens.types import Classifier

Autocast = Literal["off", "bfloat16", "float16"]
"""Number format of the matrix products on CUDA; ``off`` is float32."""

_AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_SIZES = (1, 2, 4, 8, 16, 32)
"""Images of a pass on the CPU; larger ones cost no less for an image."""

_MAX_PIXELS = 32 * 48 * 48
"""Of one pass's images, as far as there are more than `_LARGE_SIDE_IMAGES`."""

_LARGE_SIDE_IMAGES = 4
"""Most images of a pass where they are large: more gain little, and trying them out takes long."""


@dataclass(frozen=True, slots=True)
class EncodedBatch:
    """What `Encoder.encode` returns; row i belongs to image i."""

    codes: NDArray[np.uint8]
    """Packed codes, shape ``[n, ceil(n_bits / 8)]``, see `hashlens.codes`."""
    features: NDArray[np.float32]
    """F7, shape ``[n, dim]``."""
    activations: NDArray[np.float32]
    """H, in 0..1, shape ``[n, n_bits]``; a bit is set where it exceeds 0.5."""


class Encoder:
    """A model that is ready to run.

    The library behind a forward pass picks its algorithm by the batch's shape, and two algorithms
    round differently: enough to move F7 in its last digits and, now and then, to flip a bit whose
    H is near 0.5. So one size of pass, `tile`, decides; others are used where a trial at the start
    shows that they round alike, and the last pass is padded. An image's embedding does not depend
    on how many others it comes with, nor on its place among them. It may differ in the last digits
    between kinds of CPU, between CPU and CUDA, and between thread counts. See docs/adr/0010.

    Make encoders before others encode: torch's tracing, which this does, is for one thread.

    Parameters
    ----------
    checkpoint
        The model; its network is moved to the device.
    device
        ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where there is a device.
    n_threads
        CPU threads within a pass. 0: one where a pass is small (`tile` above 1), because threads
        that wait for each other cost more there than they save, else one per CPU.
    autocast
        Number format on CUDA; without effect on the CPU. It moves F7 and H by about a hundredth,
        so use one setting for a whole collection.
    compile
        Let torch.compile make code for the network: takes a C++ compiler, and time at the start,
        for which only one size of pass is used. It moves F7 and H in their last digits, so use one
        setting for a whole collection.

    Raises
    ------
    InvalidInputError
        There is no such device, or a value is out of its range.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "auto",
        n_threads: int = 0,
        *,
        autocast: Autocast = "off",
        compile: bool = False,  # noqa: A002 - the option's name
    ) -> None:
        if n_threads < 0:
            raise InvalidInputError(f"n_threads is 0 or more, not {n_threads}.", field="n_threads")
        if autocast not in get_args(Autocast):
            raise InvalidInputError(
                f"autocast is one of {', '.join(get_args(Autocast))}; not {autocast!r}.",
                field="autocast",
            )
        self._checkpoint = checkpoint
        self._device = resolve_device(device)
        self._tile = _tile(checkpoint.preprocessing.crop, self._device)
        self._n_threads = n_threads or (1 if self._tile > 1 else usable_cpus())
        checkpoint.network.to(self._device).to(memory_format=torch.channels_last)
        network = served(checkpoint.network, self._tile).to(memory_format=torch.channels_last)
        self._network = network
        self._compiles = compile
        self._call: Callable[[Tensor], HashOutput] = network
        if compile:
            self._call = torch.compile(network, dynamic=False)
        self._sizes: tuple[int, ...] | None = None
        self._staging: dict[int, Tensor] = {}
        self._autocast = _AUTOCAST_DTYPES.get(autocast)
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def model_id(self) -> str:
        """Hash of weights, preprocessing and architecture, 32 hex characters."""
        return self._checkpoint.model_id

    @property
    def backbone(self) -> str:
        """Name of the backbone."""
        return self._checkpoint.backbone

    @property
    def n_bits(self) -> int:
        """Code length, in bits."""
        return self._checkpoint.n_bits

    @property
    def dim(self) -> int:
        """Width of F7."""
        return self._checkpoint.dim

    @property
    def classes(self) -> tuple[str, ...]:
        """What the model was trained to tell apart."""
        return self._checkpoint.classes

    @property
    def preprocessing(self) -> Preprocessing:
        """Turns a decoded image into what `encode` takes."""
        return self._checkpoint.preprocessing

    @property
    def metrics(self) -> Mapping[str, float]:
        """What was measured after training."""
        return self._checkpoint.metrics

    @property
    def data_licence(self) -> str:
        """Licence and source of the data it was trained on."""
        return self._checkpoint.data_licence

    @property
    def classifier(self) -> Classifier:
        """The last layer, which reads the class scores off H; copies."""
        layer = self._checkpoint.network.classifier
        return Classifier(
            layer.weight.detach().cpu().numpy().copy(), layer.bias.detach().cpu().numpy().copy()
        )

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._device

    @property
    def tile(self) -> int:
        """Images of the forward pass that decides how results round."""
        return self._tile

    @property
    def sizes(self) -> tuple[int, ...]:
        """Images of the passes that are used, ascending; empty before the first `encode`."""
        return self._sizes or ()

    @property
    def n_threads(self) -> int:
        """CPU threads within a pass."""
        return self._n_threads

    def encode(self, batch: NDArray[np.float32] | Sequence[NDArray[np.float32]]) -> EncodedBatch:
        """Encode images. One thread at a time.

        Parameters
        ----------
        batch
            float32, shape ``[n, 3, s, s]`` with the side the preprocessing gives, or n arrays of
            shape ``[3, s, s]``; n may be 0.

        Returns
        -------
        EncodedBatch
            New arrays.

        Raises
        ------
        InvalidInputError
            An image has another shape or dtype.
        LimitError
            The device's memory does not hold even half a pass.
        """
        side = self.preprocessing.crop
        for image in (batch,) if isinstance(batch, np.ndarray) else batch:
            if image.dtype != np.float32 or image.shape[-3:] != (3, side, side):
                raise self._wrong(image)
            if image.ndim != (4 if image is batch else 3):
                raise self._wrong(image)
        # OpenMP keeps the thread count per calling thread: here is where it has to be set.
        if torch.get_num_threads() != self._n_threads:
            torch.set_num_threads(self._n_threads)
        if self._sizes is None:
            self._sizes = self._find_sizes()
        n = len(batch)
        features = np.empty((n, self.dim), dtype=np.float32)
        activations = np.empty((n, self.n_bits), dtype=np.float32)
        for rows, size in cut(n, self._sizes):
            features[rows], activations[rows] = self._run(batch[rows], size)
        return EncodedBatch(codes.pack(activations > 0.5), features, activations)

    def warm_up(self) -> None:
        """Find the sizes of pass and run each, so that the first request does not pay for it.

        Call it in the thread that will call `encode`.

        Raises
        ------
        PreconditionError
            `compile` was asked for, and cannot be done here.
        """
        side = self.preprocessing.crop
        try:
            self.encode(np.zeros((1, 3, side, side), dtype=np.float32))
        except Exception as error:
            if not self._compiles:
                raise
            raise PreconditionError(
                f"torch.compile does not work here ({type(error).__name__}). Install a C++ "
                "compiler, or leave compile off."
            ) from error

    def _wrong(self, image: NDArray[np.float32]) -> InvalidInputError:
        side = self.preprocessing.crop
        return InvalidInputError(
            f"a batch is float32 [n, 3, {side}, {side}], not {image.dtype} {list(image.shape)}. "
            "Use the encoder's own preprocessing.",
            field="batch",
        )

    def _find_sizes(self) -> tuple[int, ...]:
        # On CUDA, a pass that is not full costs little more than a smaller one.
        if self._device.type == "cpu" and not self._compiles:
            side = self.preprocessing.crop
            fits = max(_MAX_PIXELS // (side * side), _LARGE_SIDE_IMAGES)
            sizes = [size for size in _SIZES if size <= fits]
            return agreeing_sizes(self._traces, self._tile, sizes, (3, side, side))
        return (self._tile,)

    def _traces(self, images: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return checksums of what each layer makes of each image of one pass."""
        columns: list[list[int]] = []

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                columns.append([zlib.crc32(part.numpy().tobytes()) for part in output])

        hooks = [module.register_forward_hook(look) for module in self._network.modules()]
        try:
            self._forward(images, len(images))
        finally:
            for hook in hooks:
                hook.remove()
        return np.array(columns, dtype=np.uint32).T

    def _run(
        self, images: NDArray[np.float32] | Sequence[NDArray[np.float32]], size: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Run up to `size` images; on CUDA, when memory runs out, in halves, once."""
        try:
            return self._forward(images, size)
        except torch.cuda.OutOfMemoryError:
            # Handled below: in here the failed pass's tensors are still alive.
            pass
        torch.cuda.empty_cache()
        half = max(1, size // 2)
        try:
            # Another shape: the last digits may differ, which beats no answer.
            parts = [
                self._forward(images[start : start + half], half)
                for start in range(0, len(images), half)
            ]
        except torch.cuda.OutOfMemoryError as error:
            raise LimitError(
                f"the device has no memory for a pass of {half} images. Use a smaller model, "
                "free the device, or serve on the CPU."
            ) from error
        features, activations = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(activations)

    @torch.inference_mode()
    def _forward(
        self, images: NDArray[np.float32] | Sequence[NDArray[np.float32]], size: int
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        n = len(images)
        staging = self._staged(size)
        places = staging.numpy()
        for place, image in zip(places, images, strict=False):
            np.copyto(place, image)
        places[n:] = 0
        if self._stream is None:
            output = self._call(staging)
            return output.features[:n].numpy(), output.activations[:n].numpy()
        with (
            torch.cuda.stream(self._stream),
            # TF32 keeps ten bits of a product: CPU and CUDA would disagree on many more codes.
            torch.backends.cudnn.flags(deterministic=True, allow_tf32=False),
            torch.autocast("cuda", self._autocast, enabled=self._autocast is not None),
        ):
            output = self._call(staging.to(self._device, non_blocking=True))
            results = [_to_pinned(output.features[:n]), _to_pinned(output.activations[:n])]
        self._stream.synchronize()
        return results[0].numpy(), results[1].numpy()

    def _staged(self, size: int) -> Tensor:
        """Return where a pass's images are laid side by side; the same one each time.

        Pinned memory is slow to come by. A pass is over before the next one begins, so nobody
        reads what is overwritten.
        """
        staging = self._staging.get(size)
        if staging is None:
            side = self.preprocessing.crop
            staging = self._staging[size] = torch.empty(
                (size, 3, side, side),
                memory_format=torch.channels_last,
                pin_memory=self._stream is not None,
            )
        return staging


def _to_pinned(values: Tensor) -> Tensor:
    """Begin to copy a result to the host; complete after the stream is synchronised.

    torch keeps pinned memory that was let go of, so this asks the driver for it but once.
    """
    host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
    return host.copy_(values.float(), non_blocking=True)


def resolve_device(device: str) -> torch.device:
    """Return the device that an option means.

    Parameters
    ----------
    device
        ``cpu``, ``cuda``, ``cuda:N``, or ``auto``: CUDA where there is a device.

    Raises
    ------
    InvalidInputError
        There is no such device.
    """
    if device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InvalidInputError(
            f"device is cpu, cuda, cuda:N or auto; not {device!r}.", field="device"
        )
    if resolved.type == "cpu":
        return torch.device("cpu")
    n_devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = resolved.index or 0
    if index >= n_devices:
        raise InvalidInputError(
            f"device is {device!r}, but torch finds {n_devices} CUDA devices. Use cpu or auto.",
            field="device",
        )
    return torch.device("cuda", index)


def _tile(side: int, device: torch.device) -> int:
    """Choose the size of pass that decides how results round: one that costs little when not full.

    At 48 px, 8 images take little longer than one, see docs/adr/0002. At 224 px one image keeps the
    CPU busy by itself, and padding would be pure waste.
    """
    if device.type == "cuda":
        return 32
    return max(1, min(8, 8 * 48 * 48 // (side * side)))
