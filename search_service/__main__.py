"""``python -m search_service``: wires the search service and runs it."""

from __future__ import annotations

import os
import sys

import click

# gRPC, which reads this when it is imported, would write to standard error by itself, also what a
# stranger sent: as much as it likes, line breaks and all.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from hashlens.config import options
from hashlens.rpc import logs, server
from search_service.config import SearchConfig


@click.command()
@options(SearchConfig, "search")
def main(config: SearchConfig) -> None:
    """Serve SearchService: codes and features in, nearest items out."""
    logs.set_up(config.log_format, config.log_level, config.log_burst)
    # OpenMP's threads spin while they wait, and take the CPU from whatever else runs here, such as
    # the other service. It reads this when it is loaded, so the import comes after.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from search_service.servicer import SearchServicer

    sys.exit(server.run(config, SearchServicer(config)))


if __name__ == "__main__":
    main(prog_name="python -m search_service")
