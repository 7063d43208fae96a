"""A real Kubernetes API server with a real etcd: built with Go, run on free ports of this machine.

The module of Kubernetes cannot be installed by its name, because its go.mod replaces the modules
it is published in by folders of its own repository. So a small module requires it, and replaces
them by what is published; etcd's server is built in the same way.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Self

from tests.support.certificates import Authority

KUBERNETES = "1.37.2"
ETCD = "3.7.0"
"""The version that this Kubernetes is itself tested with: its go.mod names it."""
GO = (1, 26)
"""What the go.mod of both asks for."""

BUILD_S = 3600
READY_S = 180.0
STOP_S = 20.0

_STAGING = re.compile(r"^\s*(?:replace\s+)?(k8s\.io/[\w-]+)\s+=>\s+\./staging/", re.MULTILINE)


class ControlPlaneError(Exception):
    """The servers could not be built or started."""


@dataclass(frozen=True)
class Binaries:
    """What is run."""

    apiserver: Path
    etcd: Path
    kubectl: Path


@dataclass(frozen=True)
class Program:
    """A program that Go builds from a module."""

    name: str
    module: str
    version: str
    package: str
    ldflags: str = "-s -w"
    asked: tuple[str, ...] = ("--version",)
    """What it tells its version for."""

    def path(self, tools: Path) -> Path:
        """Return where it is, once it is built."""
        return tools / "bin" / f"{self.name}-{self.version}"


_ETCD = Program("etcd", "go.etcd.io/etcd/server/v3", ETCD, "go.etcd.io/etcd/server/v3")


def kubernetes_program(name: str, version: str, *asked: str) -> Program:
    """Return a program of a version of Kubernetes."""
    major, minor, _ = version.split(".")
    told = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
    flags = [f"-X k8s.io/component-base/version.{key}={value}" for key, value in told.items()]
    package = f"k8s.io/kubernetes/cmd/{name}"
    return Program(name, "k8s.io/kubernetes", version, package, " ".join(["-s -w", *flags]), asked)


def why_not() -> str:
    """Say why the servers cannot be built here; empty if they can."""
    go = shutil.which("go")
    if go is None:
        return "no Go toolchain on PATH to build an API server with"
    told = subprocess.run(
        [go, "env", "GOVERSION", "GOTOOLCHAIN"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if told.returncode:
        return f"{go} does not work: {told.stderr.strip()}"
    version, _, toolchain = told.stdout.partition("\n")
    return too_old(version.strip(), toolchain.strip())


def too_old(version: str, toolchain: str) -> str:
    """Say why a version of Go cannot build them; empty if it can, or fetches one that can."""
    numbers = re.search(r"go(\d+)\.(\d+)", version)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) >= GO:
        return ""
    if toolchain == "auto" or toolchain.endswith("+auto"):
        return ""
    wanted = ".".join(map(str, GO))
    return (
        f"Kubernetes {KUBERNETES} needs Go {wanted}, this is {version or 'unknown'} "
        f"with GOTOOLCHAIN={toolchain}"
    )


def staging_modules(go_mod: str) -> list[str]:
    """Return the modules that a go.mod of Kubernetes replaces by folders of its repository."""
    return sorted(set(_STAGING.findall(go_mod)))


def go_mod(program: Program, staging: list[str]) -> str:
    """Write the go.mod that a program is built from."""
    published = f"v0.{program.version.partition('.')[2]}"
    return "\n".join(
        [
            "module hashlens.test/control-plane",
            "",
            f"go {GO[0]}.{GO[1]}.0",
            "",
            f"require {program.module} v{program.version}",
            "",
            *(f"replace {name} => {name} {published}" for name in staging),
            "",
        ]
    )


def built(program: Program, path: Path) -> bool:
    """Say whether a file is the program in its version."""
    if not path.exists():
        return False
    try:
        told = subprocess.run(
            [path, *program.asked], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return re.search(rf"\bv?{re.escape(program.version)}\b", told.stdout) is not None


def build(tools: Path, kubernetes: str = KUBERNETES) -> Binaries:
    """Build what is not there yet; it takes minutes, once."""
    programs = (
        kubernetes_program("kube-apiserver", kubernetes, "--version"),
        _ETCD,
        kubernetes_program("kubectl", KUBERNETES, "version", "--client"),
    )
    for each in programs:
        if not built(each, each.path(tools)):
            print(f"building {each.name} {each.version}, which takes minutes, once", flush=True)
            _build(each, tools)
    return Binaries(*(each.path(tools) for each in programs))


def _build(program: Program, tools: Path) -> None:
    path = program.path(tools.resolve())
    folder = tools / "build" / path.name
    folder.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    told = _go(folder, "mod", "download", "-json", f"{program.module}@v{program.version}")
    staging = staging_modules(Path(json.loads(told)["GoMod"]).read_text())
    (folder / "go.mod").write_text(go_mod(program, staging))
    options = ("-trimpath", "-mod=mod", "-ldflags", program.ldflags, "-o", str(path))
    _go(folder, "build", *options, program.package)
    if not built(program, path):
        raise ControlPlaneError(f"{path} does not say that it is {program.version}")


def _go(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["go", *arguments],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=BUILD_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ControlPlaneError(f"go {arguments[0]} took more than {BUILD_S} s") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-20:])
        raise ControlPlaneError(f"go {' '.join(arguments[:2])} failed:\n{said or done.stdout}")
    return done.stdout


class ControlPlane:
    """An etcd and an API server; no controller, no scheduler and no kubelet.

    Parameters
    ----------
    binaries
        What to run.
    logs
        Folder that gets their logs.
    """

    def __init__(self, binaries: Binaries, logs: Path) -> None:
        self._binaries = binaries
        self._logs = logs
        self._folder = TemporaryDirectory(prefix="hashlens-apiserver-")
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.token = secrets.token_hex(16)
        self.port = 0
        self.ca = Path()

    def start(self) -> Self:
        """Start both and wait until the API server is ready."""
        folder = Path(self._folder.name)
        authority = Authority(folder)
        pair = authority.pair("apiserver")
        tokens = folder / "tokens.csv"
        tokens.touch(mode=0o600)
        tokens.write_text(f"{self.token},admin,admin,system:masters\n")
        client, peer, port = (free_port() for _ in range(3))
        etcd = f"http://127.0.0.1:{client}"
        self.port, self.ca = port, authority.ca
        self._run("etcd", self._binaries.etcd, *etcd_options(folder / "etcd", client, peer))
        health = http.client.HTTPConnection("127.0.0.1", client, timeout=5)
        self._wait("etcd", lambda: _answers(health, "/health"))
        options = {
            "etcd-servers": etcd,
            "bind-address": "127.0.0.1",
            "advertise-address": "127.0.0.1",
            # No pod has to find the server, whose address is no other machine's business.
            "endpoint-reconciler-type": "none",
            "secure-port": str(port),
            "tls-cert-file": str(pair.cert),
            "tls-private-key-file": str(pair.key),
            "cert-dir": str(folder),
            "token-auth-file": str(tokens),
            "authorization-mode": "AlwaysAllow",
            "anonymous-auth": "false",
            # As in a cluster: pod security decides about privileged pods, namespace by namespace.
            "allow-privileged": "true",
            # Nobody verifies these tokens: any key will do.
            "service-account-issuer": "https://kubernetes.default.svc",
            "service-account-key-file": str(pair.key),
            "service-account-signing-key-file": str(pair.key),
            "service-cluster-ip-range": "10.96.0.0/16",
            # Pod security is among those that are enabled by default.
            "enable-admission-plugins": "PodSecurity,ServiceAccount,ResourceQuota,LimitRanger",
        }
        arguments = [f"--{name}={value}" for name, value in options.items()]
        self._run("kube-apiserver", self._binaries.apiserver, *arguments)
        ready = self.connection(timeout_s=5)
        self._wait("kube-apiserver", lambda: _answers(ready, "/readyz", self.token))
        return self

    def stop(self) -> None:
        """End both, the API server first."""
        while self._processes:
            _, process = self._processes.pop()
            _end(process)
        self._folder.cleanup()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def connection(self, *, timeout_s: float) -> http.client.HTTPSConnection:
        """Return a connection to the API server, opened by its first request."""
        context = ssl.create_default_context(cafile=str(self.ca))
        return http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout_s, context=context
        )

    def kubeconfig(self, path: Path) -> None:
        """Write what kubectl needs to reach the server."""
        user = {"name": "admin", "user": {"token": self.token}}
        cluster = {
            "server": f"https://127.0.0.1:{self.port}",
            "certificate-authority": str(self.ca),
        }
        context = {"cluster": "check", "user": "admin"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "check", "cluster": cluster}],
            "users": [user],
            "contexts": [{"name": "check", "context": context}],
            "current-context": "check",
        }
        path.touch(mode=0o600)
        path.write_text(json.dumps(config, indent=2))

    def _run(self, name: str, binary: Path, *arguments: str) -> None:
        with (self._logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [binary, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # Ctrl-C is for this process, which ends them in order.
                start_new_session=True,
            )
        self._processes.append((name, process))

    def _wait(self, name: str, answers: object) -> None:
        assert callable(answers)
        ends_s = time.monotonic() + READY_S
        while not answers():
            for started, process in self._processes:
                if process.poll() is not None:
                    raise ControlPlaneError(
                        f"{started} ended with {process.returncode}:\n{self._last_lines(started)}"
                    )
            if time.monotonic() > ends_s:
                raise ControlPlaneError(
                    f"{name} is not ready after {READY_S:.0f} s:\n{self._last_lines(name)}"
                )
            time.sleep(0.2)

    def _last_lines(self, name: str) -> str:
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])


def etcd_options(data: Path, client_port: int, peer_port: int) -> list[str]:
    """Return the command line of a single member that need not survive a power cut."""
    client, peer = (f"http://127.0.0.1:{port}" for port in (client_port, peer_port))
    return [
        f"--data-dir={data}",
        "--name=check",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=check={peer}",
        "--unsafe-no-fsync",
    ]


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _answers(connection: http.client.HTTPConnection, path: str, token: str = "") -> bool:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process by its id: as an operator would, and if that takes long, at once."""
    if process.poll() is None:
        os.kill(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(STOP_S)
