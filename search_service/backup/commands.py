"""`hashlens backup` and `hashlens restore`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hashlens.cli.text import printable
from hashlens.config import options
from search_service.backup.put_back import RestoreConfig, put_back
from search_service.backup.take import BackupConfig, take

_LOWEST_PRIORITY = 19
"""Of the processor; the system derives the disk's from it."""


@click.command()
@click.option("--collection", "names", multiple=True, help="What to back up; repeat it. [all]")
@options(BackupConfig, "backup")
def backup(config: BackupConfig, names: tuple[str, ...]) -> None:
    """Back a data directory up; a search service may be working in it.

    Saves each collection as of its last checkpoint, and says which version that is. Full feature
    files become hard links where the file system allows it. What is deleted and erased later stays
    in the backup.
    """
    os.nice(_LOWEST_PRIORITY)
    made = take(config, names, _say)
    n = len(made.collections)
    _say(f"{n} collection{'' if n == 1 else 's'} in {config.output}")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--collection", "names", multiple=True, help="What to restore; repeat it. [all]")
@click.option("--as", "new_name", metavar="NAME", help="Call the one collection this.")
@options(RestoreConfig, "restore")
def restore(
    config: RestoreConfig, directory: Path, names: tuple[str, ...], new_name: str | None
) -> None:
    """Put a backup back: files into the data directory, ids and codes into Redis.

    Neither may have a collection of the name, and no search service may be using the data
    directory. Every checksum of the backup is compared before anything is written. Interrupted,
    it leaves no collection, and begins anew when it is started again.
    """
    put_back(directory, config, names, new_name, _say)


def _say(line: str) -> None:
    click.echo(printable(line), err=True)
