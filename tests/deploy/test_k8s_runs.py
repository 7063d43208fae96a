"""Both services and Redis, started as the manifests say: an image is encoded, stored and found.

Nothing is mocked but the machine: mounts are folders, other hosts are ports of loopback.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hashlens import Client, ClientConfig, Item
from hashlens.errors import HashlensError
from hashlens.rpc.channel import ChannelSecurity
from tests.deploy.k8s_readme import secrets
from tests.deploy.k8s_server import (
    container_of,
    free_port,
    lay_out,
    moved_environment,
    running_redis,
)
from tests.deploy.manifests import BASE, ROOT, Cluster, Combination, render
from tests.support.pictures import picture
from tests.support.redis_server import server_binaries

_READY_S = 120.0
_STOP_S = 60.0
PORTS = ("LISTEN", "HEALTH_LISTEN", "METRICS_LISTEN")


class Machine:
    """Where the pods run: a folder for each, and a port of loopback for each of theirs."""

    def __init__(self, cluster: Cluster, root: Path) -> None:
        self.cluster, self.root = cluster, root
        self.ports = {(s, p): free_port() for s in ("encoder", "search") for p in PORTS}

    @contextmanager
    def running(self, service: str, **changes: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a service with its container's variables, and those of its folder and ports."""
        container = container_of(self.cluster, service)
        root = self.root / service
        lay_out(self.cluster, container, root)
        variables = moved_environment(self.cluster, container, root) | changes
        for port in PORTS:
            name = f"HASHLENS_{service.upper()}_{port}"
            assert variables[name].startswith("0.0.0.0:")
            variables[name] = f"127.0.0.1:{self.ports[service, port]}"
        # Compiled kernels are those of the tests.
        variables.pop("NUMBA_CACHE_DIR", None)
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", f"{service}_service"],
                env={"HOME": str(root), **kept, **variables},
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self.wait(service, process)
            yield process
        finally:
            process.kill()
            process.wait(_STOP_S)

    def wait(self, service: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until all probes of the container succeed, as its kubelet would ask."""
        spec = container_of(self.cluster, service).spec
        names = [
            spec[kind]["grpc"]["service"]
            for kind in ("startupProbe", "readinessProbe", "livenessProbe")
        ]
        target = f"127.0.0.1:{self.ports[service, 'HEALTH_LISTEN']}"
        deadline = time.monotonic() + _READY_S
        with grpc.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            while names:
                log = (self.root / service / "log").read_text()
                assert process.poll() is None, log
                assert time.monotonic() < deadline, f"{service} is not {names[0]}: {log}"
                try:
                    reply = stub.Check(health_pb2.HealthCheckRequest(service=names[0]), timeout=5)
                    if reply.status == health_pb2.HealthCheckResponse.SERVING:
                        names.pop(0)
                except grpc.RpcError:
                    pass
                time.sleep(0.05)

    def target(self, service: str) -> str:
        return f"localhost:{self.ports[service, 'LISTEN']}"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    picture(colour).save(buffer, "PNG")
    return buffer.getvalue()


def redis_of_the_base(root: Path, stack: ExitStack) -> int:
    cluster = Cluster(render(BASE), secrets())
    return stack.enter_context(running_redis(cluster, server_binaries()[0], root / "redis"))


@pytest.mark.slow
@pytest.mark.parametrize("components", [(), ("tls", "external-redis")], ids=["plain", "tls"])
def test_an_image_is_found(components: tuple[str, ...], tmp_path: Path) -> None:
    pictures = [png("red"), png("blue")]
    machine = Machine(Cluster(render(Combination(BASE, components)), secrets()), tmp_path)
    (tmp_path / "redis").mkdir()
    client_token = tmp_path / "token"
    client_token.write_text(secrets()["search-credentials"]["peer-token"])
    security = ChannelSecurity(token_file=client_token)
    if "tls" in components:
        for name, text in secrets()["client-tls"].items():
            (tmp_path / name).write_text(text)
        security = replace(
            security,
            tls_ca=tmp_path / "ca.crt",
            tls_cert=tmp_path / "tls.crt",
            tls_key=tmp_path / "tls.key",
        )
    with ExitStack() as stack:
        port = redis_of_the_base(tmp_path, stack)
        stack.enter_context(machine.running("encoder"))
        search = stack.enter_context(
            machine.running(
                "search",
                HASHLENS_SEARCH_REDIS_URL=f"redis://127.0.0.1:{port}",
                HASHLENS_SEARCH_ENCODER=machine.target("encoder"),
            )
        )
        targets = machine.target("search"), machine.target("encoder")
        with Client(*targets, config=ClientConfig(security=security)) as client:
            client.create_collection("pictures")
            client.upsert("pictures", [Item("a", image=pictures[0]), Item("b", image=pictures[1])])
            # The image goes to search, and from there to the encoder.
            assert client.search("pictures", image=pictures[0], k=1).hits[0].id == "a"
        strangers = [replace(security, token_file=None)]
        if "tls" in components:
            strangers.append(ChannelSecurity(tls_ca=tmp_path / "ca.crt", token_file=client_token))
        for stranger in strangers:
            config = ClientConfig(security=stranger, deadline_s=5)
            with Client(*targets, config=config) as client, pytest.raises(HashlensError):
                client.search("pictures", id="a")
        search.terminate()
        assert search.wait(_STOP_S) == 0
