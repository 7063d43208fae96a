"""Runs what compose.yaml describes, in roots of `tests.deploy.image_root`, as an engine would.

Read-only, as the image's user without any right beyond it, with the environment, volumes, tmpfs and
secrets of compose.yaml and nothing else. All share one network of their own, where every service's
name leads to 127.0.0.1, so ports are those of the files.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.deploy.dockerfile import DOCKER
from tests.deploy.image_root import Root, call

_SET_FLAGS, _IS_UP = 0x8914, 1


def loopback_up() -> None:
    """Let a new network have 127.0.0.1."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, _SET_FLAGS, struct.pack("16sh", b"lo", _IS_UP))


@dataclass
class Container:
    """A root that is mounted, and how processes in it are started."""

    merged: Path
    user: str
    workdir: str
    env: dict[str, str]
    command: list[str]
    health: list[str]
    log: Path

    def _words(self, command: list[str]) -> list[str]:
        user, _, group = self.user.partition(":")
        return [
            *("chroot", str(self.merged), "setpriv", "--reuid", user, "--regid", group),
            *("--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"),
            *("sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *command),
        ]

    def start(self) -> subprocess.Popen[bytes]:
        """Start its command; output goes to the log."""
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._words(self.command),
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, command: list[str], timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command beside it, as `docker exec` does; status 124 where it takes too long."""
        words = self._words(command)
        try:
            return subprocess.run(
                words,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, f"not done after {timeout_s:.0f} s", "")

    def wait_healthy(self, process: subprocess.Popen[bytes], within_s: float) -> float:
        """Ask its health check until that succeeds; return how long it took, in seconds.

        Raises
        ------
        RuntimeError
            It ended, or was not healthy in time.
        """
        began_s = time.monotonic()
        while self.run(self.health).returncode:
            seconds = time.monotonic() - began_s
            if process.poll() is not None or seconds > within_s:
                state = process.poll()
                said = self.log.read_text("utf-8", errors="replace")[-3000:]
                raise RuntimeError(f"not healthy after {seconds:.0f} s, status {state}:\n{said}")
            time.sleep(0.5)
        return time.monotonic() - began_s


@contextmanager
def container(
    root: Root, service: dict[str, Any], secrets: dict[str, Any], at: Path, name: str
) -> Iterator[Container]:
    """Mount a root for a service of compose.yaml.

    Parameters
    ----------
    root
        The image.
    service, secrets
        What compose.yaml says of the service, and of secrets.
    at
        Where volumes and logs are kept: the same volumes for the same directory.
    name
        The service's name, for its log.
    """
    image = root.image
    volumes = [volume.split(":") for volume in service.get("volumes", [])]
    binds = {}
    for source, target in volumes:
        volume = at / "volumes" / source
        if not volume.exists():
            # A new volume is a copy of what the image has there, owner and mode included.
            volume.parent.mkdir(parents=True, exist_ok=True)
            call("cp", "-a", root.find(target), volume)
        binds[target] = volume
    for secret in service.get("secrets", []):
        binds[f"/run/secrets/{secret}"] = DOCKER / secrets[secret]["file"]
    with root.mounted(read_only=service["read_only"], binds=binds) as merged:
        for path in service.get("tmpfs", []):
            inside, _, options = path.partition(":")
            call("mount", "-t", "tmpfs", "-o", options, "tmpfs", merged / inside.lstrip("/"))
        yield Container(
            merged,
            service.get("user", image.user),
            image.workdir,
            {"HOME": "/nonexistent"} | image.env | service.get("environment", {}),
            list(service.get("command", image.entrypoint)),
            list(service.get("healthcheck", {}).get("test", ["CMD", *image.health]))[1:],
            at / f"{name}.log",
        )


def stop(process: subprocess.Popen[bytes], signal_name: str, grace_s: float) -> int:
    """End a container's process as an engine does, and return its status."""
    if process.poll() is None:
        process.send_signal(getattr(signal, signal_name))
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        return process.wait(10)
