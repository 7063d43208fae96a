"""Where the labelled images are. Free of torch, so that the command line reads it fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hashlens.config import setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which labelled images to take. See `encoder_service.data.source.open_split`."""

    dataset: str = setting(
        "auto",
        "auto: what --data holds, and without --data, Debian's Fashion-MNIST; folder: images of "
        "your own; or a torchvision data set: fashion-mnist, mnist, kmnist, emnist, cifar10, "
        "cifar100, svhn, stl10, flowers102, pets, food101, voc2007, or the name of another of its "
        "classes.",
    )
    data: Path | None = setting(
        None,
        "Folder with train/CLASS/* and test/CLASS/*, or CLASS/* (a fifth becomes the test split), "
        "or train.csv and test.csv; or where a data set's files are.",
    )
    download: bool = setting(
        False, "Let torchvision download the data set into --data if it is not there."
    )
    skip_unreadable: bool = setting(
        False, "Leave out images that cannot be read, and say which, instead of stopping."
    )


def split_names(names: str) -> tuple[str, ...]:
    """Return what stands between commas, or between semicolons if there is one."""
    separator = ";" if ";" in names else ","
    return tuple(name.strip() for name in names.split(separator) if name.strip())
