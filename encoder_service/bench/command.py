"""`hashlens bench encode`: its options. What it does is in `measure` and `sweep`."""

from __future__ import annotations

from dataclasses import dataclass

import click

from encoder_service.config import EncoderConfig
from hashlens.cli.bench import OutputConfig, check_outputs, publish
from hashlens.config import options, setting
from hashlens.errors import InvalidInputError

BUNDLED = "bundled"
"""Name of the checkpoint that comes with the package."""

PICTURES = ("garment", "photo")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(OutputConfig):
    """What to encode, and by how many callers."""

    models: str = setting(
        "bundled,resnet18",
        "Models, comma-separated: 'bundled', a backbone's name (random weights, 224 px), or files.",
    )
    pictures: str = setting(
        "garment,photo", "JPEG files, comma-separated: garment (28 x 28), photo (640 x 480)."
    )
    callers: int = setting(64, "Callers, each with one image on its way.")
    n_pictures: int = setting(128, "Different pictures.")
    max_batch: int = setting(EncoderConfig.max_batch, "As the service's, and the bare batch.")
    max_wait_ms: float = setting(EncoderConfig.max_wait_ms, "As the service's.")
    threads: int = setting(0, "CPU threads of the model; 0: what the service would take.")
    decode_threads: int = setting(0, "Threads that decode; 0: what the service would take.")
    sweep: bool = setting(False, "Try other max_batch and max_wait_ms instead; only the service.")
    seconds: float = setting(2.0, "Length of each load, in seconds.")
    repeats: int = setting(5, "Rounds of which medians are taken.")
    seed: int = setting(1, "Of pictures and random weights.")

    def __post_init__(self) -> None:
        for name in ("callers", "n_pictures", "repeats", "max_batch"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is at least 1", field=name)
        if self.seed < 0:
            raise InvalidInputError("seed is 0 or more", field="seed")
        if self.seconds <= 0:
            raise InvalidInputError("seconds is above 0", field="seconds")
        if not self.parts("models"):
            raise InvalidInputError("models names at least one", field="models")
        if not self.parts("pictures") or not set(self.parts("pictures")) <= set(PICTURES):
            raise InvalidInputError(f"pictures are of {', '.join(PICTURES)}", field="pictures")

    def parts(self, name: str) -> list[str]:
        """Return a comma-separated field."""
        return [part for part in getattr(self, name).split(",") if part]


@click.command()
@options(EncodeConfig, "bench")
def encode(config: EncodeConfig) -> None:
    """Measure the encoder service over gRPC, beside a bare loop over the same model.

    JPEG bytes go in, code and feature come out. The service, the load generator and the bare loop
    are processes of their own on the same cores; the bare loop has the same decoder, network and
    number of threads. Both are measured in turn. Every answer of the service is compared with the
    bare loop's, and sent alone and in a crowd, before a number is printed.
    """
    check_outputs(config)
    if config.sweep:
        from encoder_service.bench import sweep

        publish(sweep.run(config), config, sweep.drawn)
    else:
        from encoder_service.bench import measure

        publish(measure.run(config), config, measure.drawn)
