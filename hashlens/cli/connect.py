"""Where the services are, and what to say when they are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from hashlens.client import Client, wire
from hashlens.errors import UnavailableError

F = TypeVar("F", bound=Callable[..., Any])

ENCODER_METRICS = "127.0.0.1:50061"
"""Where ``hashlens up`` puts the numbers of the encoder service."""

SEARCH_METRICS = "127.0.0.1:50062"
"""Where ``hashlens up`` puts the numbers of the search service."""

PROBE_S = 2.0
"""Time for a health probe after a call has failed, in seconds."""


def targets(function: F) -> F:
    """Give a command the options ``--encoder`` and ``--search``."""
    for name, default in (("search", wire.SEARCH_TARGET), ("encoder", wire.ENCODER_TARGET)):
        function = click.option(
            f"--{name}",
            f"{name}_target",
            default=default,
            show_default=True,
            envvar=f"HASHLENS_{name}".upper(),
            show_envvar=True,
            metavar="HOST:PORT",
            help=f"The {name} service.",
        )(function)
    return function


def collection_option(function: F) -> F:
    """Give a command the option ``--collection``."""
    return click.option(
        "--collection", "-c", default="photos", show_default=True, help="The collection's name."
    )(function)


@contextmanager
def connected(search_target: str, encoder_target: str) -> Iterator[Client]:
    """Open a client; what fails because a service is away says which, and how to start it.

    Raises
    ------
    UnavailableError
        A service cannot be reached, or something behind it is away.
    """
    with Client(search_target, encoder_target) as client:
        try:
            yield client
        except UnavailableError as error:
            raise _explained(error, client, search_target, encoder_target) from error


def _explained(
    error: UnavailableError, client: Client, search_target: str, encoder_target: str
) -> UnavailableError:
    away = {state.target for state in client.health(deadline_s=PROBE_S) if not state.serving}
    names = [
        f"the {name} service at {target}"
        for name, target in (("encoder", encoder_target), ("search", search_target))
        if target in away
    ]
    if not names:
        return error
    return UnavailableError(
        f"{' and '.join(names)} cannot be reached. Start both with `hashlens up`, or say where "
        "they are with --encoder and --search."
    )
