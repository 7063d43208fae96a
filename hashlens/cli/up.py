"""`hashlens up`: both services and the embedded store, in the foreground."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from hashlens.cli.connect import ENCODER_METRICS, SEARCH_METRICS, client_config, secured
from hashlens.cli.extras import require
from hashlens.cli.processes import Services, ServicesConfig, interruptible, running
from hashlens.cli.text import console, counted, printable
from hashlens.client import Client, wire

_METRICS_ABOVE = 10
"""How far above a service's port its numbers are: 50051 and 50061."""

_STYLES = {"encoder": "cyan", "search": "magenta"}


@click.command()
@click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default="hashlens-data",
    show_default=True,
    help="Directory that keeps everything; made if it is not there.",
)
@click.option(
    "--encoder-listen",
    default=wire.ENCODER_TARGET,
    show_default=True,
    envvar="HASHLENS_ENCODER_LISTEN",
    metavar="HOST:PORT",
)
@click.option(
    "--search-listen",
    default=wire.SEARCH_TARGET,
    show_default=True,
    envvar="HASHLENS_SEARCH_LISTEN",
    metavar="HOST:PORT",
)
@click.option(
    "--encoder-metrics-listen",
    envvar="HASHLENS_ENCODER_METRICS_LISTEN",
    metavar="HOST:PORT",
    help="For `hashlens top` and Prometheus; without it, ten ports above, for this machine only.",
)
@click.option(
    "--search-metrics-listen",
    envvar="HASHLENS_SEARCH_METRICS_LISTEN",
    metavar="HOST:PORT",
    help="Likewise.",
)
@click.option(
    "--checkpoint",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The encoder's model; without it the bundled one.",
)
@click.option(
    "--redis-url",
    metavar="URL",
    help="A store of your own; without it an embedded one in --data. A URL with a password belongs "
    "into HASHLENS_SEARCH_REDIS_URL: `ps` shows this one.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@secured
def up(
    data: Path,
    encoder_listen: str,
    search_listen: str,
    encoder_metrics_listen: str | None,
    search_metrics_listen: str | None,
    checkpoint: Path | None,
    redis_url: str | None,
    device: str,
) -> None:
    """Run both services until Ctrl-C.

    The store is an embedded one unless you name another. What was acknowledged is kept. Logs go to
    standard error. A second Ctrl-C does not wait for calls in flight. The services take what else
    they can be told from the environment (HASHLENS_ENCODER_..., HASHLENS_SEARCH_...), also which
    certificates and tokens they serve with: --tls-... and --token-file are how this command, as a
    client, asks them.
    """
    require("encoder", "search", purpose="hashlens up")
    data.mkdir(parents=True, exist_ok=True)
    config = ServicesConfig(
        data=data.resolve(),
        encoder_listen=encoder_listen,
        search_listen=search_listen,
        encoder_metrics=encoder_metrics_listen or _metrics_beside(encoder_listen),
        search_metrics=search_metrics_listen or _metrics_beside(search_listen),
        checkpoint=None if checkpoint is None else checkpoint.resolve(),
        redis_url=redis_url,
        device=device,
        insecure=client_config().security.insecure,
    )
    log = console(stderr=True)
    click.echo("starting both services, which takes some seconds", err=True)
    with interruptible():
        try:
            with running(
                config, on_line=lambda name, line: _print_log(log, name, line)
            ) as services:
                try:
                    _greet(services, config)
                    services.watch()
                except KeyboardInterrupt:
                    click.echo("stopping (once more to hurry)", err=True)
        except KeyboardInterrupt:
            # While starting, or in a hurry: everything is stopped all the same.
            pass
    click.echo("stopped", err=True)


def _print_log(log: Console, name: str, line: str) -> None:
    prefix = Text(f"{name:<7} | ", _STYLES[name])
    log.print(prefix.append(printable(line.expandtabs()), "default"), soft_wrap=True)


def _greet(services: Services, config: ServicesConfig) -> None:
    """Say what runs, and what to do next."""
    with Client(services.search, services.encoder, config=client_config()) as client:
        model = client.model()
        found = client.collections()
    items = sum(info.n_items for info in found)
    click.echo(
        f"""
Hashlens is up.
  encoder  {services.encoder}   {model.backbone}, {model.n_bits} bits, {model.device}
  search   {services.search}   {counted(len(found), "collection")}, {counted(items, "item")}
  metrics  {services.encoder_metrics} and {services.search_metrics}
  data     {printable(str(config.data))}

Next, in another terminal:
  hashlens index ~/Pictures{_flags(services)}
  hashlens search cat.jpg -k 20{_flags(services)}
  hashlens top{_metrics_flags(services)}

Ctrl-C stops both. Nothing is lost.
"""
    )


def _metrics_beside(listen: str) -> str:
    """Return where a service's numbers are by default: ten ports above, else at any free one.

    Nobody asked for them, so an address that is in use must not stop the start.
    """
    port = listen.rpartition(":")[2]
    chosen = int(port) + _METRICS_ABOVE if port.isdecimal() and int(port) else 0
    with socket.socket() as probe:
        # As the server will: ports of connections that have just ended are free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", chosen))
        except (OSError, OverflowError):
            chosen = 0
    return f"127.0.0.1:{chosen}"


def _flags(services: Services) -> str:
    """Return what a command needs to find services that are not where it looks."""
    return _unusual(
        ("--encoder", services.encoder, wire.ENCODER_TARGET),
        ("--search", services.search, wire.SEARCH_TARGET),
    )


def _metrics_flags(services: Services) -> str:
    """Return what `hashlens top` needs, likewise."""
    return _unusual(
        ("--encoder-metrics", services.encoder_metrics, ENCODER_METRICS),
        ("--search-metrics", services.search_metrics, SEARCH_METRICS),
    )


def _unusual(*options: tuple[str, str | None, str]) -> str:
    """Return those of some options whose value is there and not the usual one."""
    return "".join(
        f" {option} {shlex.quote(value)}"
        for option, value, usual in options
        if value and value != usual
    )
