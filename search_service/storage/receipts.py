"""The receipt of an erasure: what was dead, and where its bytes are no more."""

from __future__ import annotations

import concurrent.futures
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from hashlens.errors import CancelledError, DeadlineError, UnavailableError
from hashlens.types import CompactResult, ErasedFile, ReplicaInfo
from search_service.storage.collection import Collection
from search_service.storage.compaction import Compacted
from search_service.storage.compactor import Compactor
from search_service.storage.erasure import Eraser

_POLL_S: Final = 0.05
_MAX_POLL_S: Final = 1.0
_READERS_S: Final = 2.0
"""How long to wait for searches that read the old files."""
_ANSWER_S: Final = 0.2
"""Left of the deadline for the answer itself."""


def erase(
    collection: Collection,
    compactor: Compactor,
    eraser: Eraser,
    data_dir: Path,
    *,
    wait_for_replicas: bool,
    deadline_s: float,
) -> CompactResult:
    """Erase what is dead now, everywhere, and tell how far that came.

    Parameters
    ----------
    collection
        On this replica.
    compactor
        Compacts it.
    eraser
        Erases in Redis.
    data_dir
        Of this replica.
    wait_for_replicas
        Wait, as long as the deadline lets, until all live replicas have done it, too.
    deadline_s
        The longest to wait, in seconds.

    Raises
    ------
    DeadlineError
        This replica has not done it in time; it goes on.
    UnavailableError
        Redis is away.
    HashlensError, OSError
        See `Collection.ask_to_erase` and `Collection.compact`.
    """
    give_up = time.monotonic() + deadline_s - min(_ANSWER_S, deadline_s / 4)
    seq = collection.ask_to_erase(deadline_s)
    try:
        collection.wait_for(seq, give_up - time.monotonic())
        done = compactor.ask(collection, seq).result(max(give_up - time.monotonic(), 0))
    except (DeadlineError, concurrent.futures.TimeoutError):
        raise DeadlineError(
            f"{collection.spec.name} is not compacted yet. That goes on; ask again for the receipt."
        ) from None
    except CancelledError as error:
        raise UnavailableError(error.message) from None
    first, replicas = _look(collection, seq, give_up)
    if wait_for_replicas:
        _poll(lambda: _all_done(*_look(collection, seq, give_up), seq), give_up)
        first, replicas = _look(collection, seq, give_up)
    log_begins_after = first - 1
    rewritten = log_begins_after >= seq - 1 and eraser.rewrite(give_up - time.monotonic())
    _poll(
        lambda: all(file.is_gone for file in done.files),
        min(give_up, time.monotonic() + _READERS_S),
    )
    files = _listed(done, collection.spec.name, data_dir)
    return CompactResult(
        version=seq,
        n_rows_erased=done.n_rows_erased,
        files=files,
        log_begins_after=log_begins_after,
        redis_rewritten=rewritten,
        replicas=replicas,
        complete=rewritten and all(file.gone for file in files) and _all_done(first, replicas, seq),
    )


def _look(collection: Collection, seq: int, give_up: float) -> tuple[int, tuple[ReplicaInfo, ...]]:
    """Return the first version in the log, trimmed up to `seq` if it may be, and all replicas."""
    found = collection.look(max(give_up - time.monotonic(), _ANSWER_S))
    if found.first is not None and found.first < seq:
        collection.checkpoint()
        found = collection.look(max(give_up - time.monotonic(), _ANSWER_S))
    return found.seq + 1 if found.first is None else found.first, tuple(found.infos)


def _all_done(first: int, replicas: tuple[ReplicaInfo, ...], seq: int) -> bool:
    """Tell whether all live replicas have erased what was dead at a version, and the log has."""
    return first >= seq and all(one.erased_version >= seq for one in replicas if one.live)


def _poll(condition: Callable[[], bool], give_up: float) -> None:
    """Wait until a condition holds, or the time is over."""
    pause_s = _POLL_S
    while not condition():
        left_s = give_up - time.monotonic()
        if left_s <= 0:
            return
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _MAX_POLL_S)


def _listed(done: Compacted, name: str, data_dir: Path) -> tuple[ErasedFile, ...]:
    """Return the files that held the rows, and those that were put aside and may."""
    files = [
        ErasedFile(str(file.path.relative_to(data_dir)), file.length_bytes, file.is_gone)
        for file in done.files
    ]
    aside = re.compile(re.escape(name) + r"-\d{8}T\d{6}Z-\d+-[0-9a-f]+")
    for directory in (data_dir / "quarantine").glob("*"):
        if aside.fullmatch(directory.name):
            files += [
                ErasedFile(str(path.relative_to(data_dir)), path.stat().st_size, gone=False)
                for path in sorted(directory.iterdir())
            ]
    return tuple(files)
