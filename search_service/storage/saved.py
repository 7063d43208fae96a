"""What of a collection's files is safe: the manifest that counts, and how the next one comes."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hashlens.errors import DataLossError
from search_service.storage import manifest
from search_service.storage.append_file import AppendFile
from search_service.storage.failpoints import reach
from search_service.storage.manifest import Manifest


class Saved:
    """The manifest of one collection on the disk. Changed by one thread at a time.

    Parameters
    ----------
    directory
        Where the files are.
    loaded
        The manifest that is there.
    """

    def __init__(self, directory: Path, loaded: Manifest) -> None:
        self._directory = directory
        self.seq = loaded.seq
        """The last write that is safe in the files."""
        self.erased_seq = loaded.erased_seq
        """Rows that were dead at this write are in none of the files, and that is safe, too."""
        self.generation = loaded.generation
        """Part of the names of the files that count now."""
        self._failed_sync = ""

    def trouble(self) -> DataLossError | None:
        """Return what is wrong if the disk has lost what was written to it."""
        if not self._failed_sync:
            return None
        return DataLossError(
            f"The disk under {self._directory} lost writes ({self._failed_sync}). Searching goes "
            "on; mend the disk, then restart the search service: Redis has what was acknowledged."
        )

    def checkpoint(
        self, state: Manifest, unsynced: Sequence[AppendFile], *, has_new_names: bool
    ) -> None:
        """Make files safe, and then a manifest that counts on them.

        Parameters
        ----------
        state
            The new manifest, of the same generation.
        unsynced
            The files that have grown.
        has_new_names
            Whether there are files that the manifest before did not have.

        Raises
        ------
        OSError
            The disk is full or broken. The manifest before still holds.
        """
        try:
            reach("checkpoint.begin")
            for file in unsynced:
                file.sync()
                reach("checkpoint.sync")
            if has_new_names:
                manifest.sync_directory(self._directory)
        except OSError as error:
            # The kernel may have dropped the pages and would report success the next time.
            self._failed_sync = str(error)
            raise
        manifest.write(self._directory, state)
        self.seq, self.erased_seq = state.seq, state.erased_seq

    def switch(self, state: Manifest, unsynced: Sequence[AppendFile]) -> None:
        """Make the files of the next generation safe, and let its manifest count.

        Where the manifest may have come and may go after a crash, `trouble` tells so afterwards.

        Raises
        ------
        OSError
            The disk is full or broken. The manifest before still holds.
        """
        for file in unsynced:
            reach("compact.sync")
            file.sync()
        manifest.sync_directory(self._directory)
        reach("compact.manifest")
        try:
            manifest.write(self._directory, state)
        except OSError as error:
            with contextlib.suppress(DataLossError):
                if manifest.read(self._directory).generation != state.generation:
                    raise
            self._failed_sync = str(error)
        self.generation = state.generation
        self.seq, self.erased_seq = state.seq, state.erased_seq

    def link_to(self, directory: Path) -> Manifest:
        """Give the manifest and its files second names in a new directory; return the manifest.

        Raises
        ------
        DataLossError
            The manifest is damaged.
        OSError
            The disk is full or broken. Nothing is left behind.
        """
        loaded = manifest.read(self._directory)
        directory.mkdir()
        try:
            for name in (manifest.MANIFEST, *loaded.files):
                os.link(self._directory / name, directory / name)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return loaded
