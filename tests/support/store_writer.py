"""A process that writes to a store until it is killed. Started once, it forks a writer per order.

An order is a line of JSON on standard input. The writer prints its process id, then the number of
writes that are acknowledged, after each.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hashlens.types import CollectionSpec, FeatureDtype
from search_service.storage import Record, Store, StoreConfig, failpoints
from tests.support.stores import DEADLINE_S, Model, make_record, make_records

SPEC = CollectionSpec("killed", "m", 48, 16, FeatureDtype.F16, 1000)
OTHER = "other"
"""The collection that comes and goes."""

Step = tuple[str, list[Record]]


def steps(seed: int, n: int) -> list[Step]:
    """The first `n` writes of a history: (upsert or delete, items)."""
    history: list[Step] = []
    for number in range(n):
        rng = np.random.default_rng((seed, number))
        ids = [f"i{i}" for i in rng.integers(0, 400, size=int(rng.integers(1, 40)))]
        kind = "delete" if rng.random() < 0.3 else "upsert"
        history.append((kind, [make_record(SPEC, item_id, rng) for item_id in ids]))
    return history


def model_after(history: list[Step]) -> Model:
    """What a history leads to."""
    model = Model()
    for kind, records in history:
        if kind == "upsert":
            model.upsert(records)
        else:
            model.delete([record.id for record in records])
    return model


def write(order: dict[str, Any]) -> None:
    """Write from where the last writer was stopped, checkpointing at random moments.

    An order may name failpoints, as the environment would, and what else is to go on meanwhile:
    ``churn``: another collection comes and goes; ``compact``: this one is compacted; ``rebuild``:
    its files are made anew.

    After the `last` write it says "done" and waits.
    """
    failpoints.read(order.get("failpoints", ""))
    config = StoreConfig(
        data_dir=Path(order["data_dir"]), redis_url=order["redis_url"], segment_bytes=4096
    )
    store = Store.open(config)
    collection = store.create(SPEC)

    def checkpoints() -> None:
        moments = random.Random(order["first"])
        while True:
            time.sleep(moments.uniform(0, 0.05))
            collection.checkpoint()

    def churn() -> None:
        spec = replace(SPEC, name=OTHER)
        for number in itertools.count():
            other = store.create(spec, deadline_s=DEADLINE_S)
            records = make_records(spec, 20, seed=number)
            other.upsert(records, request_id=f"{number}", deadline_s=DEADLINE_S)
            store.drop(OTHER, deadline_s=DEADLINE_S)

    def compacts() -> None:
        moments = random.Random(order["first"])
        while True:
            time.sleep(moments.uniform(0, 0.05))
            collection.compact()

    def rebuilds() -> None:
        while True:
            collection.rebuild(threading.Event())

    tasks = [checkpoints] + [churn] * bool(order.get("churn"))
    tasks += [compacts] * bool(order.get("compact"))
    tasks += [rebuilds] * bool(order.get("rebuild"))
    for task in tasks:
        threading.Thread(target=task, daemon=True).start()
    for number, (kind, records) in enumerate(steps(order["seed"], order["last"])):
        if number < order["first"]:
            continue
        request_id = f"{order['seed']}-{number}"
        if kind == "upsert":
            collection.upsert(records, request_id=request_id, deadline_s=DEADLINE_S)
        else:
            ids = [record.id for record in records]
            collection.delete(ids, request_id=request_id, deadline_s=DEADLINE_S)
        print(number + 1, flush=True)
    print("done", flush=True)
    time.sleep(60)


def main() -> None:
    """Fork a writer for each order; standard input's end is ours."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            write(json.loads(line))
            os._exit(0)
        print(f"pid {child}", flush=True)
        _, status = os.waitpid(child, 0)
        print(f"ended {status}", flush=True)


if __name__ == "__main__":
    main()
