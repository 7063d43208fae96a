"""A server whose gRPC ends by itself does not stay as a process that serves nobody."""

from __future__ import annotations

import subprocess
import sys

_SERVER = """
import asyncio
import sys

import grpc

from hashlens.rpc import logs, server
from hashlens.rpc.health import ServiceState
from hashlens.rpc.server_config import ServerConfig

make, made = grpc.aio.server, []


def kept(*args, **options):
    made.append(make(*args, **options))
    return made[-1]


grpc.aio.server = kept


class Nothing:
    names = ()
    method_limits = {}

    def register(self, to): pass
    def listens(self, address): pass
    def state(self): return ServiceState()
    def drain(self): pass
    def metrics(self): return ()
    async def close(self): print("closed", flush=True)

    async def warm_up(self):
        # A defect in gRPC ends its loop, which shuts the server down in just this way.
        asyncio.get_running_loop().call_later(
            0.2, lambda: asyncio.ensure_future(made[0].stop(None))
        )


logs.set_up("text", "info")
sys.exit(server.run(ServerConfig(grace_s=1.0), Nothing()))
"""


def test_the_process_ends_and_says_why() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SERVER], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert "gRPC has stopped to serve by itself" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.endswith("closed\n"), "what the service holds is written first"
