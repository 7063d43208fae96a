"""Both services under mixed traffic for a while: nothing that they hold or take may drift.

``python -m tests.soak.run --minutes 20``, or ``make soak``. Two replicas of the search service and
an encoder, with TLS and tokens, on one Redis; one replica is restarted and the certificate is
renewed on the way. Prints a table, writes ``soak.png`` and ``soak.json``, and fails if anything
drifted or failed.
"""

from __future__ import annotations

import json
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import click

from hashlens.cli.text import console
from tests.soak import report, verdict
from tests.soak.samples import Sampler
from tests.soak.traffic import SETUP_S, Plan
from tests.soak.verdict import Call
from tests.support.certificates import Authority, Mount
from tests.support.redis_server import RedisServer, server_binaries
from tests.support.services import ServiceProcess

N_REPLICAS = 2
SAMPLES = 1200
"""About so many of each process in a run."""
RESTART_AT = 0.4
RENEW_AT = 0.6
"""When, as a share of the run."""


class Cluster:
    """An encoder, replicas, their Redis and what they show each other."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._redis = stack.enter_context(RedisServer(server_binaries()[0]))
        self._authority = Authority(folder)
        self._served = Mount(folder / "served", self._authority.pair("served"))
        self.security = self._authority.security(token_file=folder / "token", tls_name="localhost")
        secret = secrets.token_hex(32)
        (folder / "token").write_text(secret)
        (folder / "tokens").write_text(f"admin {secret} soak\n")
        secured = [
            *("--tls-cert", str(self._served.pair.cert), "--tls-key", str(self._served.pair.key)),
            *("--tokens", str(folder / "tokens")),
        ]
        self._encoder = stack.enter_context(
            ServiceProcess("encoder_service", *secured, log=folder / "encoder.log")
        )
        shown = [
            *("--encoder-tls-ca", str(self._authority.ca), "--encoder-tls-name", "localhost"),
            *("--peer-tls-ca", str(self._authority.ca), "--peer-tls-name", "localhost"),
            *("--encoder-token-file", str(folder / "token")),
            *("--peer-token-file", str(folder / "token")),
        ]
        self._replicas: list[ServiceProcess] = []
        for number, port in enumerate(_free_ports(N_REPLICAS)):
            self._replicas.append(
                stack.enter_context(
                    ServiceProcess(
                        "search_service",
                        *secured,
                        *shown,
                        *("--listen", f"127.0.0.1:{port}"),
                        *("--data-dir", str(folder / f"replica-{number}")),
                        *("--redis-url", self._redis.url, "--encoder", self._encoder.target),
                        # Often enough that a run sees several of each.
                        *("--checkpoint-interval-s", "10", "--compaction-min-rows", "20000"),
                        log=folder / f"replica-{number}.log",
                    )
                )
            )

    @property
    def encoder(self) -> str:
        return self._encoder.target

    @property
    def search(self) -> str:
        """All replicas, for a client that goes round."""
        return "ipv4:" + ",".join(replica.target for replica in self._replicas)

    def pids(self) -> dict[str, int]:
        """Return who runs, by role."""
        roles = {"redis": self._redis.process.pid, "encoder": self._encoder.process.pid}
        for number, replica in enumerate(self._replicas):
            roles[f"search {number}"] = replica.process.pid
        return roles

    def restart(self) -> int:
        """Restart a replica as a rollout would, and return how it ended."""
        status = self._replicas[0].stop()
        self._replicas[0].start()
        return status

    def renew(self) -> None:
        """Put another certificate in the place of the old one."""
        self._served.swap(self._authority.pair("renewed"))


def _free_ports(n: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class _Traffic:
    """The traffic's process, from ready to the end."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        path = folder / "plan.json"
        plan.write(path)
        self._plan = plan
        self._log = folder / "traffic.log"
        with self._log.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.soak.traffic", str(path)],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def __enter__(self) -> _Traffic:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 2 * SETUP_S)
        if not ready or not self.process.stdout.readline():
            self.__exit__()
            raise click.ClickException(f"no traffic:\n{self._log.read_text()}")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def finish(self) -> None:
        """Wait for the last call."""
        status = self.process.wait(4 * self._plan.deadline_s + 30)
        if status:
            raise click.ClickException(f"the traffic broke off:\n{self._log.read_text()}")

    def calls(self) -> list[Call]:
        lines = Path(self._plan.calls).read_text().splitlines()
        return [Call(**json.loads(line)) for line in lines]


def soak(minutes: float, rate: float, seed: int, output: Path) -> list[str]:
    """Run, print and write what was found; return what was not as it should be."""
    output.mkdir(parents=True, exist_ok=True)
    seconds = minutes * 60
    events: list[tuple[float, str]] = []
    faults: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hl-soak-")))
        cluster = Cluster(folder, stack)
        plan = Plan(
            search=cluster.search,
            encoder=cluster.encoder,
            tls_ca=str(cluster.security.tls_ca),
            tls_name=cluster.security.tls_name,
            token_file=str(cluster.security.token_file),
            seconds=seconds,
            rate=rate,
            seed=seed,
            calls=str(output / "calls.jsonl"),
        )
        traffic = stack.enter_context(_Traffic(plan, folder))
        began_s = time.time()

        def pids() -> dict[str, int]:
            return {**cluster.pids(), "traffic": traffic.process.pid}

        with Sampler(pids, max(seconds / SAMPLES, 0.05)) as sampler:
            _sleep_until(began_s + RESTART_AT * seconds)
            events.append((time.time(), "restart"))
            status = cluster.restart()
            if status:
                faults.append(f"the restarted replica ended with status {status}")
            _sleep_until(began_s + RENEW_AT * seconds)
            cluster.renew()
            events.append((time.time(), "certificate renewed"))
            _sleep_until(began_s + seconds)
        ended_s = time.time()
        traffic.finish()
        calls = traffic.calls()
    processes = verdict.process_rows(sampler.samples)
    kinds = verdict.call_rows(calls, began_s, ended_s)
    for row in (*processes, *kinds):
        faults += row.faults()
    report.show(console(), processes, kinds, verdict.errors(calls), faults)
    report.plot(sampler.samples, calls, events, began_s, output / "soak.png")
    report.write(processes, kinds, faults, minutes, output / "soak.json")
    return faults


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0, at_s - time.time()))


@click.command()
@click.option("--minutes", default=20.0, show_default=True, help="How long.")
@click.option("--rate", default=1.0, show_default=True, help="Times the usual 35 calls a second.")
@click.option("--seed", default=1, show_default=True, help="Chooses the calls.")
@click.option(
    "--output",
    default="build/soak",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the plot, the table as JSON, and every call.",
)
def main(minutes: float, rate: float, seed: int, output: Path) -> None:
    """Let both services run under mixed traffic, and tell whether anything drifts."""
    sys.exit(1 if soak(minutes, rate, seed, output) else 0)


if __name__ == "__main__":
    main()
