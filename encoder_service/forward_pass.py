"""One network on its device: so many images in, F7 and H out, in one shape of pass at a time."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from encoder_service.model.network import HashNet, HashOutput
from hashlens.errors import InvalidInputError, LimitError

Images = NDArray[np.float32] | Sequence[NDArray[np.float32]]
"""Shape ``[n, 3, s, s]``, or n arrays of shape ``[3, s, s]``."""

_BLOCK = 64
"""A multiple of the numbers that any CPU's vector instructions take at a time."""

_Outputs = tuple[NDArray[Any], NDArray[Any]]
"""F7, shape ``[n, dim]``, and H, shape ``[n, n_bits]``."""


class ForwardPass:
    """A network, and where its images are laid. On the CPU, several threads may call it at a time.

    Parameters
    ----------
    network
        Made ready by `encoder_service.model.serving.served`, on the device.
    device
        Where it is.
    side
        Of its images, in pixels.
    autocast
        Number format of the matrix products on CUDA; None for float32.
    compiles
        Whether torch.compile makes code for it.
    """

    def __init__(
        self,
        network: HashNet,
        device: torch.device,
        side: int,
        *,
        autocast: torch.dtype | None = None,
        compiles: bool = False,
    ) -> None:
        self._network = network
        self._device = device
        self._side = side
        self._autocast = autocast
        self._call: Callable[[Tensor], HashOutput] = network
        if compiles:
            self._call = torch.compile(network, dynamic=False)
        self._own = threading.local()
        """Of each thread: where a pass's images are laid side by side, by its size."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, images: Images, size: int) -> _Outputs:
        """Run up to `size` images; on CUDA, when memory runs out, in halves, once.

        Raises
        ------
        LimitError
            The device's memory does not hold even half a pass.
        """
        try:
            return self._run(images, size)
        except torch.cuda.OutOfMemoryError:
            # Handled below: in here the failed pass's tensors are still alive.
            pass
        torch.cuda.empty_cache()
        half = max(1, size // 2)
        try:
            # Another shape: the last digits may differ, which beats no answer.
            parts = [
                self._run(images[start : start + half], half)
                for start in range(0, len(images), half)
            ]
        except torch.cuda.OutOfMemoryError as error:
            raise LimitError(
                f"the device has no memory for a pass of {half} images. Use a smaller model, "
                "free the device, or serve on the CPU."
            ) from error
        features, activations = zip(*parts, strict=True)
        return np.concatenate(features), np.concatenate(activations)

    def traces(self, images: NDArray[np.float32]) -> NDArray[np.uint32]:
        """Return checksums of what each layer makes of each image of one pass.

        Nobody else may use the network meanwhile.

        Returns
        -------
        NDArray
            Shape ``[n, n_layers]``.
        """
        columns: list[list[int]] = []

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                columns.append([zlib.crc32(part.numpy().tobytes()) for part in output])

        hooks = [module.register_forward_hook(look) for module in self._network.modules()]
        try:
            _, activations = self._run(images, len(images))
        finally:
            for hook in hooks:
                hook.remove()
        columns.append([zlib.crc32(row.tobytes()) for row in activations])
        return np.array(columns, dtype=np.uint32).T

    @torch.inference_mode()
    def _run(self, images: Images, size: int) -> _Outputs:
        n = len(images)
        staging = self._staged(size)
        places = staging.numpy()
        for place, image in zip(places, images, strict=False):
            np.copyto(place, image)
        places[n:] = 0
        if self._stream is None:
            output = self._call(staging)
            return output.features[:n].numpy(), steady_sigmoid(output.scores)[:n].numpy()
        with (
            torch.cuda.stream(self._stream),
            # TF32 keeps ten bits of a product: CPU and CUDA would disagree on many more codes.
            torch.backends.cudnn.flags(deterministic=True, allow_tf32=False),
            torch.autocast("cuda", self._autocast, enabled=self._autocast is not None),
        ):
            output = self._call(staging.to(self._device, non_blocking=True))
            activations = steady_sigmoid(output.scores)
            results = [_to_pinned(output.features[:n]), _to_pinned(activations[:n])]
        self._stream.synchronize()
        return results[0].numpy(), results[1].numpy()

    def _staged(self, size: int) -> Tensor:
        """Return where a pass's images are laid side by side; the same one each time.

        Pinned memory is slow to come by. A thread's pass is over before its next one begins, so
        nobody reads what is overwritten.
        """
        kept: dict[int, Tensor] | None = getattr(self._own, "staging", None)
        if kept is None:
            kept = self._own.staging = {}
        staging = kept.get(size)
        if staging is None:
            staging = kept[size] = torch.empty(
                (size, 3, self._side, self._side),
                memory_format=torch.channels_last,
                pin_memory=self._stream is not None,
            )
        return staging


def steady_sigmoid(scores: Tensor) -> Tensor:
    """Return the sigmoid of each row, which no other row changes.

    torch computes whole blocks of up to 32 numbers by one formula and what is left over by another,
    which may differ in the last bit; so each row is filled up to whole blocks.

    Parameters
    ----------
    scores
        Shape ``[n, n_bits]``.
    """
    n_bits = scores.shape[1]
    return torch.sigmoid(nn.functional.pad(scores, (0, -n_bits % _BLOCK)))[:, :n_bits]


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
