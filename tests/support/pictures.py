"""Small labelled pictures on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220), "green": (20, 200, 20)}


def picture(name: str, seed: int = 0, size: tuple[int, int] = (40, 50)) -> Image.Image:
    """Noise around a colour, so that no two pictures are alike."""
    noise = np.random.default_rng(seed).integers(0, 30, (size[1], size[0], 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


def make_tree(root: Path) -> None:
    """Write ``train`` and ``test`` with two classes, images in folders below, and other files."""
    for split, n in (("train", 6), ("test", 2)):
        for name in ("red", "blue"):
            folder = root / split / name / "deeper"
            folder.mkdir(parents=True)
            for i in range(n):
                kind = ("png", "jpg")[i % 2]
                picture(name, i, (40 + i, 50)).save(folder / f"{i}.{kind}")
            (folder / "notes.txt").write_text("no image")
            (folder / "._0.png").write_bytes(b"what a Mac leaves behind")


def make_undivided_tree(root: Path, counts: dict[str, int]) -> None:
    """Write ``CLASS/*`` without splits, so many of each."""
    for name, n in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(n):
            picture(name, i).save(root / name / f"{i}.png")
