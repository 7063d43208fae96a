"""The Job of deploy/k8s/components/bulk-encode, its command line run for real."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from hashlens import Client, ClientConfig
from hashlens.cli.index import Refusal, index
from hashlens.cli.shard import Shard
from hashlens.errors import NotFoundError
from hashlens.rpc.channel import ChannelSecurity
from tests.support.pictures import COLOURS, picture
from tests.support.services import ServiceProcess, wait_until

COMPONENT = Path(__file__).parents[2] / "deploy" / "k8s" / "components" / "bulk-encode"
JOB = yaml.safe_load((COMPONENT / "job.yaml").read_text())["spec"]
(CONTAINER,) = JOB["template"]["spec"]["containers"]
ENVIRONMENT = dict(
    line.split("=", 1)
    for line in (COMPONENT / "bulk-encode.env").read_text().splitlines()
    if not line.startswith("#")
)
N_SHARDS: int = JOB["completions"]
COLLECTION = ENVIRONMENT["COLLECTION"]

N_PICTURES = 1800
BAD = {"album 1/cut.jpg", "text.png"}
TOKEN = "t" * 40
POD_S = 150.0


@dataclass(frozen=True)
class Cluster:
    """The services, and where this machine has what a pod finds below its mounts."""

    encoder: str
    search: str
    mounts: dict[str, Path]

    def pod(self, shard: int, **instead: str) -> subprocess.Popen[str]:
        """Start what the kubelet would start for an index of the Job."""
        variables = {
            **ENVIRONMENT,
            **{entry["name"]: entry["value"] for entry in CONTAINER["env"]},
            "JOB_COMPLETION_INDEX": str(shard),
            "HASHLENS_ENCODER": self.encoder,
            "HASHLENS_SEARCH": self.search,
            **instead,
        }
        variables = {name: self.here(value) for name, value in variables.items()}
        words = [
            self.here(re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word))
            for word in [*CONTAINER["command"], *CONTAINER["args"]]
        ]
        assert words[0] == "hashlens"
        run = "from hashlens.cli.main import main; main(prog_name='hashlens')"
        return subprocess.Popen(
            [sys.executable, "-c", run, *words[1:]],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": ":".join(sys.path), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def here(self, text: str) -> str:
        """Return a word with a path of the container as the one on this machine."""
        for mount, path in self.mounts.items():
            text = re.sub(rf"(^|=){re.escape(mount)}(?=/|$)", rf"\g<1>{path}", text)
        return text

    def all_pods(self) -> list[Any]:
        """Run one pod for each index, all at a time, and return their summaries."""
        pods = [self.pod(shard) for shard in range(N_SHARDS)]
        try:
            printed = [pod.communicate(timeout=POD_S)[0] for pod in pods]
        finally:
            for pod in pods:
                pod.kill()
        assert [pod.returncode for pod in pods] == [0] * N_SHARDS, printed
        return [json.loads(text[text.index("{") :]) for text in printed]

    def reported(self) -> list[str]:
        """Return the paths in all reports."""
        return [
            json.loads(line)["path"]
            for shard in range(N_SHARDS)
            for line in self.report(shard).read_text().splitlines()
        ]

    def report(self, shard: int) -> Path:
        return self.mounts["/reports"] / f"{COLLECTION}-{shard}.jsonl"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Both services, asking for tokens, and empty mounts."""
    folder = tmp_path_factory.mktemp("cluster")
    mounts = {mount["mountPath"]: folder / mount["name"] for mount in CONTAINER["volumeMounts"]}
    for path in mounts.values():
        path.mkdir()
    (mounts["/secrets/token"] / "token").write_text(TOKEN)
    (folder / "tokens").write_text(f"write {TOKEN} bulk-encode\n")
    secured = ("--tokens", str(folder / "tokens"))
    with (
        ServiceProcess("encoder_service", *secured, log=folder / "encoder.log") as encoder,
        ServiceProcess(
            "search_service",
            "--data-dir",
            str(folder / "data"),
            *secured,
            log=folder / "search.log",
        ) as search,
    ):
        yield Cluster(encoder.target, search.target, mounts)


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[Client]:
    security = ChannelSecurity(token_file=cluster.mounts["/secrets/token"] / "token")
    with Client(cluster.search, cluster.encoder, config=ClientConfig(security=security)) as client:
        yield client


def write_pictures(folder: Path) -> list[str]:
    """Write many pictures, of which few differ, and two that are none; return the names."""
    names = [f"album {n % 7}/{n:05}.jpg" for n in range(N_PICTURES)]
    kinds = sorted(COLOURS)
    for n, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if n < 20:
            picture(kinds[n % len(kinds)], n, (256, 256)).save(path)
        else:
            os.link(folder / names[n % 20], path)
    (folder / "album 1" / "cut.jpg").write_bytes((folder / names[0]).read_bytes()[:500])
    (folder / "text.png").write_text("I am no picture")
    return names


def n_items(client: Client) -> int:
    try:
        return client.collection(COLLECTION).n_items
    except NotFoundError:
        return 0


def stored_ids(client: Client, names: list[str]) -> list[str]:
    return [
        item.id
        for begin in range(0, len(names), 500)
        for item in client.get_items(COLLECTION, names[begin : begin + 500])
    ]


def written_until_killed(cluster: Cluster, client: Client, n_all: int) -> int:
    """Kill a pod when its first batch is in; return how many of its items there are then."""
    pod = cluster.pod(1)
    try:
        wait_until(lambda: n_items(client) > 0, within_s=POD_S, what="a first batch is in")
        pod.send_signal(signal.SIGKILL)
        printed = pod.communicate(timeout=POD_S)[0]
    finally:
        pod.kill()
    assert pod.returncode in (-signal.SIGKILL, 0), printed
    return n_items(client) if pod.returncode else n_all


def test_a_job_whose_pod_is_killed(cluster: Cluster, client: Client) -> None:
    images = cluster.mounts["/images"]
    names = write_pictures(images)
    shares = [[n for n in names if Shard(i, N_SHARDS).has(n)] for i in range(N_SHARDS)]

    while (n_before := written_until_killed(cluster, client, len(shares[1]))) == len(shares[1]):
        # It was quicker than the kill: everything is left for another one.
        client.delete(COLLECTION, shares[1])
        wait_until(lambda: n_items(client) == 0, within_s=POD_S, what="there is nothing")
        cluster.report(1).unlink(missing_ok=True)
    assert 0 < n_before < len(shares[1])
    assert not cluster.report(1).exists()

    summaries = cluster.all_pods()
    assert [s["shard"] for s in summaries] == [f"{i}/{N_SHARDS}" for i in range(N_SHARDS)]
    assert [s["indexed"] + s["unchanged"] for s in summaries] == [len(share) for share in shares]
    # What the first try had written is not encoded again; its last call may have come in later.
    assert summaries[1]["unchanged"] >= n_before
    # What others have written is acknowledged before it is here.
    wait_until(lambda: n_items(client) == N_PICTURES, within_s=POD_S, what="all are here")
    assert sorted(stored_ids(client, names)) == sorted(names)
    assert sorted(cluster.reported()) == sorted(BAD)

    # Another machine has the volume elsewhere: the same ids, and nothing to do.
    elsewhere = images.with_name("elsewhere")
    images.rename(elsewhere)
    again = Cluster(cluster.encoder, cluster.search, {**cluster.mounts, "/images": elsewhere})
    # Reports are replaced, not added to.
    (elsewhere / "text.png").unlink()
    summaries = again.all_pods()
    assert [s["unchanged"] for s in summaries] == [len(share) for share in shares]
    assert sum(s["indexed"] for s in summaries) == 0
    assert n_items(client) == N_PICTURES
    assert again.reported() == ["album 1/cut.jpg"]


@pytest.mark.parametrize(
    ("instead", "status"),
    [
        ({"HASHLENS_TOKEN_FILE": "/images/token"}, Refusal.exit_code),
        ({"SHARDS": "1"}, Refusal.exit_code),
        ({"HASHLENS_SEARCH": "127.0.0.1:1"}, 1),
    ],
)
def test_a_pod_that_fails_says_whether_another_try_helps(
    cluster: Cluster, instead: dict[str, str], status: int
) -> None:
    cluster.mounts["/images"].mkdir(exist_ok=True)
    (cluster.mounts["/images"] / "token").write_text("x" * 40)
    pod = cluster.pod(1, **instead)
    try:
        printed = pod.communicate(timeout=POD_S)[0]
    finally:
        pod.kill()
    assert pod.returncode == status, printed
    (rule,) = [r for r in JOB["podFailurePolicy"]["rules"] if r["action"] == "FailJob"]
    assert (status in rule["onExitCodes"]["values"]) == (status == Refusal.exit_code)
    assert rule["onExitCodes"]["containerName"] == CONTAINER["name"]


def test_shares_are_as_many_as_pods() -> None:
    (shards,) = [entry["value"] for entry in CONTAINER["env"] if entry["name"] == "SHARDS"]
    assert int(shards) == N_SHARDS
    assert JOB["completionMode"] == "Indexed"


def test_variables_are_those_that_the_command_reads() -> None:
    read = {parameter.envvar for parameter in index.params if isinstance(parameter.envvar, str)}
    used = set(re.findall(r"\$\((\w+)\)", " ".join(CONTAINER["args"])))
    ours = {name for name in ENVIRONMENT if name.startswith("HASHLENS_")}
    assert ours <= read
    assert ENVIRONMENT.keys() - ours | {"JOB_COMPLETION_INDEX", "SHARDS"} == used
    tls = yaml.safe_load((COMPONENT / "tls" / "kustomization.yaml").read_text())
    (generator,) = tls["configMapGenerator"]
    assert {literal.split("=")[0] for literal in generator["literals"]} <= read


def test_only_reports_are_written() -> None:
    writable = [m["mountPath"] for m in CONTAINER["volumeMounts"] if not m.get("readOnly")]
    assert writable == ["/reports"]
    security = CONTAINER["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert not security["allowPrivilegeEscalation"]
