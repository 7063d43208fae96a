"""What `hashlens evaluate` can be told. Free of torch, so that the command line reads it fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from encoder_service.data.config import DataConfig, split_names
from hashlens.config import setting
from hashlens.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    """Options of `hashlens evaluate`."""

    checkpoint: Path | None = setting(
        None, "The model, a safetensors file; the bundled one without."
    )
    protocol: Literal["split", "lin2015", "unseen-classes"] = setting(
        "split",
        "split: test images among themselves; lin2015: test images among the training images; "
        "unseen-classes: test images of classes that training left out.",
    )
    local: bool = setting(
        False, "Run the model and the searches in this process, without the services."
    )
    encoder: str | None = setting(
        None, "host:port of a running encoder service; without, both services are started."
    )
    search: str | None = setting(None, "host:port of a running search service, with --encoder.")
    queries: int = setting(0, "Ask with so many queries only, drawn at random; 0: all.")
    unseen_classes: str = setting(
        "",
        "Classes of unseen-classes, with commas between, or semicolons where a name has a comma; "
        "without, those the recipe left out.",
    )
    force: bool = setting(
        False, "Go on where the model's classes and the data's, or the protocol's, do not fit."
    )
    seed: int = setting(1, "Decides the drawn queries, LSH, ITQ and the confidence intervals.")
    device: str = setting("auto", "cpu, cuda, cuda:N, or auto: CUDA where there is a device.")
    json: Path | None = setting(None, "Write the numbers as JSON to this file; - prints them.")
    plot: Path | None = setting(None, "Write the plots as PNG into this folder.")
    html: Path | None = setting(None, "Write a report, plots and examples included, to this file.")

    def __post_init__(self) -> None:
        if self.queries < 0 or self.queries == 1:
            raise InvalidInputError(
                "queries is 0 for all, or 2 or more: the interval of a mean takes as many.",
                field="queries",
            )
        if (self.encoder is None) != (self.search is None):
            raise InvalidInputError(
                "give --encoder and --search, or neither: then both are started.", field="encoder"
            )
        if self.local and self.encoder is not None:
            raise InvalidInputError(
                "--local uses no services: leave out --encoder and --search, or --local.",
                field="local",
            )
        if self.unseen_classes and self.protocol != "unseen-classes":
            raise InvalidInputError(
                "unseen_classes belongs to the protocol unseen-classes: choose that, or leave the "
                "classes out.",
                field="unseen_classes",
            )

    @property
    def unseen(self) -> tuple[str, ...]:
        """The names in `unseen_classes`."""
        return split_names(self.unseen_classes)
