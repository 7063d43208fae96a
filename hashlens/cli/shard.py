"""A share of a folder: the files that one of several runs takes."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import click


@dataclass(frozen=True, slots=True)
class Shard:
    """One of `count` shares, each file is in exactly one.

    Which one depends on the file's path below the folder and on `count`, on nothing else: not on
    the machine, where the folder is mounted, or what else is in it.
    """

    index: int = 0
    count: int = 1

    def has(self, path: str) -> bool:
        """Return whether a file is in this share.

        Parameters
        ----------
        path
            Below the folder.
        """
        if self.count == 1:
            return True
        # As the file system has it, also where that is no UTF-8.
        name = path.encode("utf-8", "surrogateescape")
        digest = hashlib.blake2b(name, digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.count == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class ShardType(click.ParamType[Shard]):
    """Reads ``I/N``."""

    name = "shard"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shard:
        """Return the shard that a text means."""
        if isinstance(value, Shard):
            return value
        parts = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", value)
        if parts is None:
            self.fail(f"{value!r} is not I/N, such as 0/3", param, ctx)
        index, count = int(parts[1]), int(parts[2])
        if index >= count:
            self.fail(f"{value}: of {count} shards the last is {count - 1}/{count}", param, ctx)
        return Shard(index, count)
