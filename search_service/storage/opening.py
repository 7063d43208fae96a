"""What of a data directory can be served at a start."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from hashlens.errors import DataLossError
from search_service.storage import data_dir, layout
from search_service.storage.counters import Counters
from search_service.storage.local import LocalCollection

logger = logging.getLogger(__name__)


def opened(directory: Path, quarantine: Path, counters: Counters) -> Iterator[LocalCollection]:
    """Open the collections in a directory one by one; put aside what is none, or is damaged.

    Whatever one of them is like, the others are served.

    Parameters
    ----------
    directory
        Of all collections; made if it is not there.
    quarantine
        Where to put aside.
    counters
        Told how many were.

    Raises
    ------
    PreconditionError
        Another version of Hashlens wrote one of them.
    OSError
        The directory cannot be read or made.
    """
    directory.mkdir(exist_ok=True)
    data_dir.clean(directory)
    for path in sorted(directory.glob("[!.]*")):
        if not layout.is_safe_name(path.name):
            logger.warning("%s is not of this service: left alone", path)
            continue
        try:
            if path.is_symlink() or not path.is_dir():
                raise DataLossError(f"{path} is not a directory")
            local = LocalCollection.load(path)
        except OSError as error:
            # It may be whole: too many open files are no reason to put it away.
            logger.error("%s cannot be opened (%s) and is not served", path, error)
            continue
        except DataLossError as error:
            try:
                aside = data_dir.quarantine(path, quarantine)
            except OSError as broken:
                logger.error("%s; it cannot be put aside (%s) and is not served", error, broken)
                continue
            counters.n_quarantined += 1
            logger.error("%s; the files are in %s now", error, aside)
            continue
        yield local
