"""Where the services are, and what to say when they are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from hashlens.client import Client, ClientConfig, wire
from hashlens.errors import UnavailableError
from hashlens.rpc.channel import ChannelSecurity
from hashlens.types import ServiceHealth

F = TypeVar("F", bound=Callable[..., Any])

_NOTED = "hashlens.security"

ENCODER_METRICS = "127.0.0.1:50061"
"""Where ``hashlens up`` puts the numbers of the encoder service."""

SEARCH_METRICS = "127.0.0.1:50062"
"""Where ``hashlens up`` puts the numbers of the search service."""

PROBE_S = 2.0
"""Time for a health probe after a call has failed, in seconds."""


def secured(function: F) -> F:
    """Give a command options that say how services are known; `client_config` has their values."""
    path = click.Path(dir_okay=False, path_type=Path)
    for name, kind, metavar, text in (
        ("insecure", bool, None, "Do without TLS where others can listen, too."),
        ("token_file", path, "FILE", "File with the bearer token to show."),
        ("tls_name", str, "NAME", "Name in the services' certificates, where it is another one."),
        ("tls_key", path, "FILE", "Private key of --tls-cert, PEM."),
        ("tls_cert", path, "FILE", "Certificate to show to the services, PEM."),
        ("tls_ca", path, "FILE", "Who signs the services' certificates, PEM; says --tls, too."),
        ("tls", bool, None, "Use TLS; without --tls-ca public authorities are trusted."),
    ):
        flag = "--" + name.replace("_", "-")
        function = click.option(
            f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
            name,
            type=None if kind is bool else kind,
            default=False if kind is bool else None,
            envvar=f"HASHLENS_{name}".upper(),
            show_envvar=True,
            metavar=metavar,
            help=text,
            expose_value=False,
            callback=_note,
        )(function)
    return function


def _note(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    assert parameter.name is not None
    noted: dict[str, Any] = context.meta.setdefault(_NOTED, {})
    if value is not None:
        noted[parameter.name] = value


def client_config() -> ClientConfig:
    """Return how the running command's client knows the services, see `secured`.

    Raises
    ------
    InvalidInputError
        The options do not go together.
    """
    context = click.get_current_context(silent=True)
    noted = {} if context is None else context.meta.get(_NOTED, {})
    return ClientConfig(security=ChannelSecurity(**noted))


def targets(function: F) -> F:
    """Give a command the options ``--encoder`` and ``--search``, and those of `secured`."""
    function = secured(function)
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
    config = client_config()
    with Client(search_target, encoder_target, config=config) as client:
        try:
            yield client
        except UnavailableError as error:
            raise _explained(
                error, client, search_target, encoder_target, config.security
            ) from error


def last_words(detail: str) -> str:
    """Return what says most of gRPC's chain of causes: the last, such as `Connection refused`."""
    return detail.removesuffix(": OK").rpartition(": ")[2].rstrip(".")


def what_to_do(states: Iterable[ServiceHealth], security: ChannelSecurity) -> str:
    """Return what helps against services that do not serve."""
    silent = [state for state in states if not state.answered]
    if not silent:
        return "It is there and lets no call through: `hashlens health -v` says why."
    advice = "Start both with `hashlens up`, or say where they are with --encoder and --search."
    if not security.is_tls:
        return f"{advice} If they use TLS, name who signs their certificates with --tls-ca."
    return (
        f"{advice} The last words: {last_words(silent[0].detail)}. Is --tls-ca who signed their "
        "certificates, with the name that is called (else --tls-name)? Do they want a "
        "certificate of yours (--tls-cert, --tls-key)?"
    )


def _explained(
    error: UnavailableError,
    client: Client,
    search_target: str,
    encoder_target: str,
    security: ChannelSecurity,
) -> UnavailableError:
    away = {state.target: state for state in client.health(deadline_s=PROBE_S) if not state.serving}
    names = [
        f"the {name} service at {target}"
        for name, target in (("encoder", encoder_target), ("search", search_target))
        if target in away
    ]
    if not names:
        return error
    can = "cannot be reached" if any(not s.answered for s in away.values()) else "does not serve"
    advice = what_to_do(away.values(), security)
    return UnavailableError(f"{' and '.join(names)} {can}. {advice}")
