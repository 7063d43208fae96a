"""Everything that may go wrong with several replicas, at random and at once; then all must agree.

``python -m tests.faults.chaos --minutes 3 --seed 1``, a part of ``make faults``. A round
writes through all replicas while processes, Redis and files come to harm, then everything is put
right and compared with what was acknowledged. The same seed chooses the same harm.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from hashlens.errors import (
    DeadlineError,
    HashlensError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from hashlens.types import SearchOptions
from tests.support.backups import hashlens
from tests.support.chaos_checks import assert_alike, assert_tidy, assert_verified
from tests.support.chaos_cluster import NAME, SPEC, Cluster
from tests.support.chaos_writer import Writer, query
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import wait_until
from tests.support.stores import on_disk

SETTLE_S = 90.0
ASKED = ("compact", "verify", "repair", "backup")
TROUBLES = ("kill", "kill", "power", "hang", "redis", "pause", *ASKED)
PASSING = (UnavailableError, DeadlineError, OverloadedError)
"""What a caller may be told while things are broken."""


class Chaos:
    """Some replicas, some writers, and a history of harm."""

    def __init__(self, binary: Path, seed: int, n_replicas: int = 3, n_writers: int = 2) -> None:
        self.draw = random.Random(seed)
        self.harm: Counter[str] = Counter()
        self._n_replicas = n_replicas
        self._stack = ExitStack()
        self._folder = Path(tempfile.mkdtemp(prefix="hl-chaos-"))
        self._server = RedisServer(binary)
        self._spare = RedisServer(binary)
        self.cluster = Cluster(self._folder, self._server.url)
        self.writers = [Writer(n, seed, self.cluster, n_replicas) for n in range(n_writers)]
        self._n_backups = 0
        self._one_backup = threading.Lock()
        self._errors: list[BaseException] = []

    def __enter__(self) -> Chaos:
        try:
            self._stack.enter_context(self._server)
            self._stack.enter_context(self._spare)
            self._stack.callback(self.cluster.close)
            for number in range(self._n_replicas):
                self.cluster.start(number)
            with self.cluster.client(0) as client:
                client.create_collection(NAME, spec=SPEC)
            for number in range(self._n_replicas):
                wait_until(
                    lambda n=number: self._follows(n, 0), within_s=SETTLE_S, what="it is there"
                )
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            shutil.rmtree(self._folder)
        else:
            click.echo(f"the directories are kept: {self._folder}", err=True)

    def round(self, troubles: list[str], damage: str) -> None:
        """Do harm while it is written and read, put all right, compare.

        Parameters
        ----------
        troubles
            Of `TROUBLES`, in this order.
        damage
            What becomes of one replica's files while it is down: ``delete``, ``flip``, ``cut``, or
            nothing. At the beginning, where the others have all that it had.
        """
        self._errors.clear()
        victim = self.draw.randrange(self._n_replicas)
        if damage:
            self.harm[damage] += 1
            self.cluster.end(victim)
            self.cluster.damage(victim, damage, self.draw)
        stop = threading.Event()
        threads = [self._start(writer.run, stop) for writer in self.writers]
        threads.append(self._start(self._read, stop, self.draw.random()))
        try:
            if damage:
                self.cluster.start(victim)
            for trouble in troubles:
                self.harm[trouble] += 1
                time.sleep(self.draw.uniform(0, 0.8))
                if trouble in ASKED:
                    number, wait = self.draw.randrange(self._n_replicas), self.draw.random() < 0.5
                    threads.append(self._start(self._ask, trouble, number, wait))
                else:
                    self._make(trouble)
        finally:
            self._put_right()
            stop.set()
            for thread in threads:
                thread.join(SETTLE_S)
            stuck = [thread.name for thread in threads if thread.is_alive()]
        assert not stuck, f"{stuck} hang"
        if self._errors:
            raise self._errors[0]
        self._settle(damage, victim)

    def _start(self, work: Callable[..., None], *arguments: object) -> threading.Thread:
        def guarded() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                self._errors.append(error)

        thread = threading.Thread(target=guarded, name=work.__name__)
        thread.start()
        return thread

    def _read(self, stop: threading.Event, seed: float) -> None:
        """Search here and there: right, or an error that passes."""
        draw = random.Random(seed)
        while not stop.wait(0.05):
            number = draw.randrange(self._n_replicas)
            try:
                with self.cluster.client(number) as client:
                    result = client.search(
                        NAME, embedding=query(draw.randrange(4)), options=SearchOptions(k=20)
                    )
            except PASSING:
                continue
            except NotFoundError:
                # One without files has not asked Redis yet what there is.
                assert not self.cluster.has_followed(number), "a collection was forgotten"
                continue
            receipt = result.receipt
            # One that has fallen out of the log is not exact either, and says so.
            assert not (receipt.exact and receipt.rows_without_feature), receipt
            distances = [hit.distance for hit in result.hits]
            assert None not in distances
            assert distances == sorted(distances, key=float)  # type: ignore[arg-type]

    def _make(self, trouble: str) -> None:
        number = self.draw.randrange(self._n_replicas)
        if trouble == "kill":
            self.cluster.end(number)
            time.sleep(self.draw.choice((0.0, 0.5, 2.5)))
            self.cluster.start(number)
        elif trouble == "power":
            for one in range(self._n_replicas):
                self.cluster.end(one)
            self._server.kill()
            self._server.start()
            for one in range(self._n_replicas):
                self.cluster.start(one)
        elif trouble == "hang":
            pid = self.cluster.pid(number)
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.draw.choice((0.5, 3.0)))
            os.kill(pid, signal.SIGCONT)
        elif trouble == "redis":
            self._server.kill()
            time.sleep(self.draw.choice((0.0, 1.0, 2.5)))
            self._server.start()
        else:
            self._server.pause()
            time.sleep(self.draw.choice((0.2, 1.0, 2.5)))
            self._server.resume()

    def _ask(self, trouble: str, number: int, wait: bool) -> None:
        """Have a replica do something long, while the rest goes on."""
        if trouble == "backup":
            with self._one_backup:  # They share the Redis that they are restored into.
                self._back_up(number)
            return
        try:
            with self.cluster.client(number) as client:
                if trouble == "compact":
                    client.compact(NAME, wait_for_replicas=wait)
                    return
                found = client.verify(NAME, repair=trouble == "repair", deadline_s=30)
        except (*PASSING, NotFoundError):
            return
        assert not found.differences or number == self.cluster.damaged, (number, found)

    def _back_up(self, number: int) -> None:
        """Back up a running directory, and restore it elsewhere: whole, and of items as written."""
        self._n_backups += 1
        saved = self._folder / f"saved-{self._n_backups}"
        restored = self._folder / f"restored-{self._n_backups}"
        source = self.cluster.data_dir(number)
        if not (source / "collections" / NAME / "MANIFEST.json").exists():
            return
        done = hashlens("backup", "--data-dir", source, "--output", saved)
        if done.returncode and not (source / "collections" / NAME).exists():
            return
        assert done.returncode == 0 or self.cluster.damaged == number, done.stderr
        if done.returncode == 0:
            with self._spare.client() as client:
                client.flushall()
            done = hashlens(
                *("restore", saved, "--data-dir", restored, "--redis-url", self._spare.url)
            )
            assert done.returncode == 0, done.stderr
            _, items = on_disk(restored / "collections" / NAME)
            for record in items.values():
                assert any(writer.has_written(record) for writer in self.writers), record
        shutil.rmtree(saved, ignore_errors=True)
        shutil.rmtree(restored, ignore_errors=True)

    def _put_right(self) -> None:
        self._server.process.send_signal(signal.SIGCONT)
        if self._server.process.poll() is not None:
            self._server.start()
        for number in range(self._n_replicas):
            assert self.cluster.is_running(number), f"replica {number} ended by itself"

    def _follows(self, number: int, version: int) -> bool:
        try:
            with self.cluster.client(number) as client:
                info = client.collection(NAME, deadline_s=5)
        except (HashlensError, AssertionError):
            return False
        return info.writable and info.version >= version

    def _settle(self, damage: str, victim: int) -> None:
        deadline_ms = max(writer.last_expiry_ms for writer in self.writers)
        time.sleep(max(0.0, deadline_ms / 1000 - time.time()))
        items = {k: v for writer in self.writers for k, v in writer.items.items()}
        numbers = range(self._n_replicas)
        with self._server.client() as redis:
            what = "everybody follows, and what has expired is gone"

            def settled() -> bool:
                version = int(redis.hget(f"hl:{{{NAME}}}:meta", "seq") or 0)
                there = int(redis.hget(f"hl:{{{NAME}}}:meta", "n_items") or 0)
                return there <= len(items) and all(self._follows(n, version) for n in numbers)

            try:
                wait_until(settled, within_s=SETTLE_S, what=what)
            except AssertionError as error:
                raise AssertionError(f"{error}: {self.cluster.states()}") from None
            if damage == "flip":
                self._replace_if_it_misses(victim)
            assert_alike(self.cluster, redis, items, numbers)
        for number in numbers:
            assert_tidy(self.cluster, number)
        assert_verified(self.cluster, numbers, items)
        self.cluster.damaged = None

    def _replace_if_it_misses(self, victim: int) -> None:
        """A feature that was damaged is missing until its files are replaced."""
        with self.cluster.client(victim) as client:
            client.verify(NAME)
            if not client.collection(NAME).n_missing_features:
                return
        self.harm["replaced"] += 1
        self.cluster.end(victim)
        self.cluster.damage(victim, "delete", self.draw)
        self.cluster.start(victim)
        wait_until(lambda: self._follows(victim, 0), within_s=SETTLE_S, what="it is replaced")


@click.command()
@click.option("--minutes", default=3.0, help="How long.")
@click.option("--seed", default=1, help="The same seed does the same harm.")
@click.option("--replicas", default=3, help="Search processes.")
def main(minutes: float, seed: int, replicas: int) -> None:
    """Harm replicas, Redis and files at random, round after round, and compare."""
    ends_s = time.monotonic() + minutes * 60
    number = 0
    with Chaos(server_binaries()[0], seed, replicas) as chaos:
        while time.monotonic() < ends_s:
            troubles = [chaos.draw.choice(TROUBLES) for _ in range(chaos.draw.randint(2, 5))]
            damage = chaos.draw.choice(("", "", "delete", "flip", "cut"))
            began_s = time.monotonic()
            try:
                chaos.round(troubles, damage)
            except BaseException:
                click.echo(f"failed: --seed {seed}, round {number}: {damage} {troubles}")
                raise
            click.echo(
                f"round {number}: {damage or '-'} {' '.join(troubles)}: "
                f"{time.monotonic() - began_s:.1f} s, {chaos.cluster.counts()}"
            )
            number += 1
        click.echo(f"{number} rounds, seed {seed}: {dict(chaos.harm)}")


if __name__ == "__main__":
    main()
