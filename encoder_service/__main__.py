"""``python -m encoder_service``: wires the encoder service and runs it."""

from __future__ import annotations

import logging
import os
import sys

import click

# gRPC, which reads this when it is imported, would write to standard error by itself, also what a
# stranger sent: as much as it likes, line breaks and all.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from encoder_service import openmp
from encoder_service.config import EncoderConfig
from hashlens.config import options
from hashlens.rpc import logs, server


@click.command()
@options(EncoderConfig, "encoder")
def main(config: EncoderConfig) -> None:
    """Serve EncoderService: image bytes in, binary codes and features out."""
    logs.set_up(config.log_format, config.log_level, config.log_burst)
    # Read when torch is loaded, so the import comes after.
    openmp.set_up()
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
