"""Exit with 0 if a health port says SERVING: ``python probe.py HOST:PORT NAME``.

For container engines, which know no gRPC; Kubernetes asks by itself. NAME is ``liveness``,
``readiness`` or a service's full name.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 4.0


def main(target: str, name: str) -> int:
    """Ask, and say in a line what the answer was."""
    with grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            sys.stdout.write(f"{target} {name}: {error.code().name}\n")
            return 1
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    sys.stdout.write(f"{target} {name}: {status}\n")
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
