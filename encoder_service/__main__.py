"""``python -m encoder_service``: wires the encoder service and runs it."""

from __future__ import annotations

import logging
import os
import sys

import click

# gRPC, which reads this when it is imported, would write to standard error by itself, also what a
# stranger sent: as much as it likes, line breaks and all.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from encoder_service.config import EncoderConfig
from hashlens.config import options
from hashlens.rpc import logs, server


@click.command()
@options(EncoderConfig, "encoder")
def main(config: EncoderConfig) -> None:
    """Serve EncoderService: image bytes in, binary codes and features out."""
    logs.set_up(config.log_format, config.log_level, config.log_burst)
    # OpenMP's threads spin while they wait, and take the CPU from whatever else runs here, such as
    # the other service. It reads this when it is loaded, so the import comes after.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # But a tenth of a millisecond is not worth going to sleep for: a small network's layers take
    # little longer. Passes side by side have one thread each, and spin for nobody.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    from encoder_service.servicer import EncoderServicer

    sys.exit(server.run(config, EncoderServicer(config)))


if __name__ == "__main__":
    try:
        main(prog_name="python -m encoder_service")
    except SystemExit as end:
        # All is closed. What the interpreter would still take down are PyTorch's libraries, and
        # Triton, where it is installed, then writes a page about itself into the log.
        if isinstance(end.code, int):
            logging.shutdown()
            sys.stdout.flush()
            os._exit(end.code)
        raise
