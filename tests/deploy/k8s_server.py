"""Starts the Redis of deploy/k8s as its container would, with files in a folder of the test's."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tests.deploy.k8s_policies import mounts, redis_options
from tests.deploy.k8s_programs import arguments, environment
from tests.deploy.manifests import Cluster, Container

_READY_S = 60.0
_PORTS = range(20_000, 32_000)
"""Not among those that the kernel gives to whoever asks for any, as each connection does."""


def free_port() -> int:
    """Return a port on loopback that nobody has just now, and hardly anybody will take."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def lay_out(cluster: Cluster, container: Container, root: Path) -> None:
    """Make a container's mounts below a folder, with what is in secrets and ConfigMaps."""
    volumes = {volume["name"]: volume for volume in container.pods.spec["volumes"]}
    for mount in container.spec["volumeMounts"]:
        place = root / mount["mountPath"].lstrip("/")
        place.mkdir(parents=True, exist_ok=True)
        volume = volumes.get(mount["name"], {})
        files: Mapping[str, str] = {}
        if "secret" in volume:
            files = cluster.secrets[volume["secret"]["secretName"]]
        elif "configMap" in volume:
            files = cluster.config(volume["configMap"]["name"]) or {}
        for name, text in files.items():
            (place / name).write_text(moved(text, cluster, container, root))


def moved(text: str, cluster: Cluster, container: Container, root: Path) -> str:
    """Return a text in which paths of a container's mounts are below a folder."""
    places = "|".join(re.escape(str(mount.path)) for mount in mounts(cluster, container))
    return re.sub(rf"(?<![\w/.])({places})(?![\w.-])", lambda found: f"{root}{found[0]}", text)


def container_of(cluster: Cluster, name: str) -> Container:
    """Find a workload's container by the workload's name."""
    for container in cluster.containers():
        if container.pods.owner["metadata"]["name"] == name:
            return container
    raise AssertionError(f"no {name}")


def moved_environment(cluster: Cluster, container: Container, root: Path) -> dict[str, str]:
    """Return the variables of a container, with paths below a folder."""
    variables = environment(cluster, container)
    return {name: moved(text, cluster, container, root) for name, text in variables.items()}


@contextmanager
def running_redis(cluster: Cluster, binary: Path, root: Path) -> Iterator[int]:
    """Run the Redis of the manifests on loopback; yield its port."""
    container = container_of(cluster, "redis")
    lay_out(cluster, container, root)
    port = free_port()
    _, *words = [moved(word, cluster, container, root) for word in arguments(cluster, container)]
    is_tls = "tls-port" in redis_options(cluster, container)
    words += ["--bind", "127.0.0.1", "--tls-port" if is_tls else "--port", str(port)]
    log = root / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(binary), *words], stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_for(port, process, log)
        yield port
    finally:
        process.kill()
        process.wait(30)


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
