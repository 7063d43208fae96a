"""Many crashes in a row, each at a chosen place, with the whole truth compared after each.

``python -m tests.faults.campaign --rounds 240 --seed 1`` is what ``make faults`` runs; a short form
is part of the tests. A round that fails prints its seed and number: the same seed gives the same
rounds up to what the scheduler makes of them, and ``--only N`` runs round N's kind of crash alone.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import click

from hashlens.errors import NotFoundError
from search_service.storage import Store, StoreConfig, failpoints
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.store_writer import OTHER, SPEC, model_after, steps
from tests.support.stores import (
    DEADLINE_S,
    Model,
    assert_holds,
    assert_in_redis,
    contents,
    on_disk,
    wait_until,
)

STEPS = 400
"""Writes of one history; a campaign begins a new one on a new directory when it is through."""

_END_S = 60.0


@dataclass(frozen=True)
class Crash:
    """How one round ends."""

    kind: str
    """A failpoint; ``anywhere``: the writer is killed at a random moment; ``redis``: the server is;
    ``both``: both are."""
    nth: int
    """At which time that the failpoint is reached, or after how many writes."""

    def order(self) -> dict[str, object]:
        """What to tell the writer."""
        if self.kind not in failpoints.NAMES:
            return {}
        group = self.kind.partition(".")[0]
        return {
            "failpoints": f"{self.kind}=kill@{self.nth}",
            "churn": group in ("create", "drop"),
            "compact": group == "compact",
            "rebuild": group == "rebuild",
        }


LOCAL = sorted(
    name
    for name in failpoints.NAMES
    if name.partition(".")[0]
    in ("append", "checkpoint", "seal", "create", "drop", "compact", "rebuild")
)
"""Places that a writer alone comes by."""


def crashes(rounds: int, seed: int) -> list[Crash]:
    """Choose the crashes of a campaign: every place in turn, each at a random time."""
    draw = random.Random(seed)
    kinds = [*LOCAL, "anywhere", "redis", "both"]
    chosen = []
    for number in range(rounds):
        if number % len(kinds) == 0:
            draw.shuffle(kinds)
        kind = kinds[number % len(kinds)]
        # A writer that is let write for a second comes by some places often, by others seldom.
        chosen.append(Crash(kind, draw.randint(1, 12 if kind.startswith("append") else 2)))
    return chosen


class Campaign:
    """One server, one forking writer, one history after the other."""

    def __init__(self, binary: Path, seed: int) -> None:
        self._seed = seed
        self._moments = random.Random(seed)
        self._stack = ExitStack()
        self._server = RedisServer(binary)
        self._history_number = -1
        self._acknowledged = STEPS
        self._directory = Path(tempfile.mkdtemp(prefix="hl-campaign-"))
        self._writer: subprocess.Popen[str]
        self._output: IO[str]

    def __enter__(self) -> Campaign:
        self._stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        self._stack.enter_context(self._server)
        self._writer = subprocess.Popen(
            [sys.executable, "-m", "tests.support.store_writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self._writer.stdout is not None
        self._output = self._writer.stdout
        self._stack.callback(self._end_writer)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def round(self, crash: Crash) -> bool:
        """Write until the crash, then compare; return whether the crash came."""
        if self._acknowledged >= STEPS - 60:
            self._begin_history()
        first = self._acknowledged
        pid = self._start_writer(crash)
        stop_after = first + (60 if crash.kind in failpoints.NAMES else crash.nth)
        came = False
        while True:
            if self._read_progress():
                came = True
                break
            if self._acknowledged >= stop_after:
                time.sleep(self._moments.uniform(0, 0.02))
                if crash.kind in ("redis", "both"):
                    self._server.kill()
                if crash.kind == "redis":
                    time.sleep(self._moments.uniform(0, 0.05))
                    self._server.start()
                    while self._acknowledged <= stop_after:
                        assert not self._read_progress()
                with suppress(ProcessLookupError):  # It has crashed, or come to its end, by itself.
                    os.kill(pid, signal.SIGKILL)
                while not self._read_progress():
                    pass
                if crash.kind == "both":
                    self._server.start()
                break
        self._compare()
        return came or crash.kind not in failpoints.NAMES

    def _begin_history(self) -> None:
        self._history_number += 1
        self._acknowledged = 0
        with self._server.client() as client:
            client.flushall()
        shutil.rmtree(self._data_dir, ignore_errors=True)

    @property
    def _data_dir(self) -> Path:
        return self._directory / "data"

    @property
    def _history(self) -> int:
        return self._seed + 1000 * self._history_number

    def _start_writer(self, crash: Crash) -> int:
        order = {"data_dir": str(self._data_dir), "redis_url": self._server.url}
        order |= {"seed": self._history, "first": self._acknowledged, "last": STEPS}
        order |= crash.order()
        assert self._writer.stdin is not None
        self._writer.stdin.write(json.dumps(order) + "\n")
        self._writer.stdin.flush()
        return int(self._read().removeprefix("pid "))

    def _read(self) -> str:
        line = self._output.readline().strip()
        assert line, "the writer ended"
        return line

    def _read_progress(self) -> bool:
        """Read what is acknowledged by now; return whether the writer has ended."""
        # The last number may have lost its end of line to the kill.
        number, ended, _ = self._read().partition("ended")
        # Not one that was quicker than the kill, and has come to the end of its history.
        if number and number != "done":
            self._acknowledged = int(number)
        return bool(ended)

    def _end_writer(self) -> None:
        assert self._writer.stdin is not None
        self._writer.stdin.close()
        self._output.close()
        self._writer.wait(_END_S)

    def _compare(self) -> None:
        """Open what is left: all that was acknowledged; the write under way whole or not at all."""
        history = steps(self._history, self._acknowledged + 1)
        n = self._acknowledged
        possible = [model_after(history[:n]), model_after(history)]
        config = StoreConfig(
            data_dir=self._data_dir, redis_url=self._server.url, segment_bytes=4096
        )
        with Store.open(config) as store:
            collection = store.create(SPEC, deadline_s=DEADLINE_S)
            wait_until(lambda: collection.info().writable, "the log is followed")
            with self._server.client() as client:
                version = int(client.hget(f"hl:{{{SPEC.name}}}:meta", "seq") or 0)
                actual = self._model_at(version, possible)
                assert_in_redis(client, SPEC.name, actual)
            assert_holds(collection, actual)
            assert contents(collection.snapshot()) == actual.items
            self._acknowledged += actual is possible[1] and version != possible[0].version
            with suppress(NotFoundError):
                store.drop(OTHER, deadline_s=DEADLINE_S)
            leftovers = [path.name for path in (self._data_dir / "collections").iterdir()]
            assert leftovers == [SPEC.name], leftovers
        directory = self._data_dir / "collections" / SPEC.name
        assert on_disk(directory) == (actual.version, actual.items)
        listed = set(json.loads((directory / "MANIFEST.json").read_bytes())["files"])
        assert {path.name for path in directory.iterdir()} == listed | {"MANIFEST.json"}
        assert not (self._data_dir / "quarantine").exists()

    def _model_at(self, version: int, possible: list[Model]) -> Model:
        found = [model for model in possible if model.version == version]
        assert found, f"Redis is at {version}, not at any of {[m.version for m in possible]}"
        return found[0]


@click.command()
@click.option("--rounds", default=240, help="Crashes for each kind of server.")
@click.option("--seed", default=1, help="The same seed gives the same crashes.")
@click.option("--only", type=int, help="Run this round alone.")
def main(rounds: int, seed: int, only: int | None) -> None:
    """Kill the store and its Redis at every named place, again and again, and compare."""
    chosen = crashes(rounds, seed)
    for binary in server_binaries():
        began_s = time.monotonic()
        came: Counter[str] = Counter()
        with Campaign(binary, seed) as campaign:
            for number, crash in enumerate(chosen):
                if only is not None and number != only:
                    continue
                try:
                    came[crash.kind] += campaign.round(crash)
                except BaseException:
                    print(f"failed: {binary.name}, --seed {seed} --only {number} ({crash})")
                    raise
        missed = sorted({crash.kind for crash in chosen} - {kind for kind in came if came[kind]})
        print(
            f"{binary.name}: {sum(came.values())} crashes in {len(chosen)} rounds, seed {seed}, "
            f"{time.monotonic() - began_s:.0f} s; "
            + ", ".join(f"{k} {n}" for k, n in sorted(came.items()))
        )
        if missed and only is None:
            raise SystemExit(f"never came: {', '.join(missed)}")


if __name__ == "__main__":
    main()
