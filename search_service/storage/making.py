"""The files of a new, empty collection."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from hashlens.types import CollectionSpec
from search_service.storage import layout, manifest
from search_service.storage.arrays import Arrays
from search_service.storage.failpoints import reach
from search_service.storage.manifest import Manifest


def make(
    directory: Path,
    spec: CollectionSpec,
    *,
    epoch: str,
    n_buckets: int,
    segment_bytes: int,
) -> None:
    """Make the files of an empty collection; the directory appears whole or not at all.

    Raises
    ------
    OSError
        It is there already, or the disk is full or broken.
    """
    draft = directory.with_name(f".new-{uuid.uuid4().hex}")
    draft.mkdir()
    try:
        rows_per_segment = layout.rows_per_segment(spec, segment_bytes)
        arrays = Arrays.create(draft, spec, generation=0, rows_per_segment=rows_per_segment)
        arrays.close()
        empty = Manifest(
            spec=spec,
            epoch=epoch,
            n_buckets=n_buckets,
            generation=0,
            rows_per_segment=rows_per_segment,
            seq=0,
            log_crc32=0,
            rows=0,
            deaths=0,
            erased_seq=0,
            files=arrays.state()[0],
        )
        reach("create.manifest")
        manifest.write(draft, empty)
        reach("create.rename")
        draft.rename(directory)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    manifest.sync_directory(directory.parent)
