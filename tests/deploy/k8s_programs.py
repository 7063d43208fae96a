"""What a container's program makes of its environment and arguments: the program is asked."""

from __future__ import annotations

import math
import os
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import click

from encoder_service.__main__ import main as encoder_main
from encoder_service.config import EncoderConfig
from encoder_service.servicer import EncoderServicer
from hashlens.cli.main import main as hashlens_main
from hashlens.rpc.health import HealthServicer
from search_service.__main__ import main as search_main
from search_service.config import SearchConfig
from search_service.servicer import SearchServicer
from tests.deploy.manifests import Cluster, Container


@dataclass(frozen=True)
class Service:
    """One of our two services, as its image starts it."""

    command: click.Command
    config: type[EncoderConfig] | type[SearchConfig]
    names: tuple[str, ...]

    def health_names(self) -> set[str]:
        return set(HealthServicer(self.names)._serving)


SERVICES = {
    "hashlens-encoder": Service(encoder_main, EncoderConfig, tuple(EncoderServicer.names)),
    "hashlens-search": Service(search_main, SearchConfig, tuple(SearchServicer.names)),
}
"""By image."""

OUTSIDE = frozenset(["NUMBA_CACHE_DIR", "JOB_COMPLETION_INDEX"])
"""Variables that are not options and are read all the same."""

_OF_KUBERNETES = {"JOB_COMPLETION_INDEX": "0"}
"""Variables that Kubernetes adds by itself."""


def service_of(container: Container) -> Service | None:
    """Return which of our services runs in a container; None for anything else."""
    return None if "command" in container.spec else SERVICES.get(container.image)


def environment(cluster: Cluster, container: Container) -> dict[str, str]:
    """Return the variables that a container's program sees."""
    found: dict[str, str] = {}
    if container.pods.owner["kind"] == "Job":
        found |= _OF_KUBERNETES
    for source in container.spec.get("envFrom", ()):
        if "configMapRef" in source:
            found |= cluster.config(source["configMapRef"]["name"]) or {}
        else:
            found |= cluster.secrets.get(source["secretRef"]["name"], {})
    for variable in container.spec.get("env", ()):
        value = variable.get("value", "")
        if "valueFrom" in variable:
            value = _value_from(cluster, container, variable["valueFrom"])
        found[variable["name"]] = expanded(value, found)
    return found


def arguments(cluster: Cluster, container: Container) -> list[str]:
    """Return a container's command and arguments, with variables put in."""
    seen = environment(cluster, container)
    words = [*container.spec.get("command", ()), *container.spec.get("args", ())]
    return [expanded(word, seen) for word in words]


def expanded(text: str, variables: Mapping[str, str]) -> str:
    """Put variables in, as Kubernetes does: one that is not known stays as it is."""
    return re.sub(r"\$\((\w+)\)", lambda m: variables.get(m[1], m[0]), text)


def _value_from(cluster: Cluster, container: Container, source: Mapping[str, Any]) -> str:
    if reference := source.get("resourceFieldRef"):
        _, _, resource = reference["resource"].partition(".")
        limit = container.spec["resources"]["limits"][resource]
        return str(math.ceil(quantity(limit) / quantity(reference.get("divisor", "1"))))
    if reference := source.get("fieldRef"):
        metadata = container.pods.owner["metadata"]
        fields_ = {
            "metadata.name": metadata["name"] + "-0",
            "metadata.namespace": metadata["namespace"],
        }
        return str(fields_[reference["fieldPath"]])
    if reference := source.get("secretKeyRef"):
        return cluster.secrets.get(reference["name"], {}).get(reference["key"], "")
    reference = source["configMapKeyRef"]
    return (cluster.config(reference["name"]) or {}).get(reference["key"], "")


_SUFFIXES = {"": 1, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    f"{letter}i": 1024.0 ** (i + 1) for i, letter in enumerate("KMGT")
}


def quantity(text: str | int) -> float:
    """Read a quantity of Kubernetes, such as 500m or 2Gi."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text))
    assert match is not None, text
    return float(match[1]) * _SUFFIXES[match[2]]


def parse(cluster: Cluster, container: Container) -> dict[str, Any]:
    """Have the program parse what its container gives it.

    Raises
    ------
    click.ClickException, HashlensError
        It would not start.
    """
    seen, words = environment(cluster, container), arguments(cluster, container)
    with mock.patch.dict(os.environ, seen, clear=True):
        service = service_of(container)
        if service is not None:
            return service.command.make_context(container.image, words).params
        # A directory that is mounted has to be there.
        mounted = {mount["mountPath"] for mount in container.spec.get("volumeMounts", ())}
        name, *words = ["/" if word in mounted else word for word in words]
        assert name == "hashlens", name
        command: click.Command = hashlens_main
        context = None
        while isinstance(command, click.Group):
            context = click.Context(command, context, info_name=name)
            name, *words = words
            inner = command.get_command(context, name)
            if inner is None:
                raise click.UsageError(f"no command {name}")
            command = inner
        context = command.make_context(name, words, parent=context)
        # What is said about the connection is noted beside the parameters.
        noted = [value for value in context.meta.values() if isinstance(value, dict)]
        return context.params | {name: v for values in noted for name, v in values.items()}


def config_of(cluster: Cluster, container: Container) -> EncoderConfig | SearchConfig:
    """Build a service's configuration, as it does when it starts."""
    service = service_of(container)
    assert service is not None
    values = parse(cluster, container)
    return service.config(**{field.name: values[field.name] for field in fields(service.config)})


def known_variables(cluster: Cluster, container: Container) -> set[str]:
    """Return the variables that a container's program reads."""
    service = service_of(container)
    if service is not None:
        return set(_variables(service.command))
    words, command = arguments(cluster, container), typing.cast(click.Command, hashlens_main)
    found = set(_variables(command))
    for word in words[1:]:
        if isinstance(command, click.Group) and (
            inner := command.get_command(click.Context(command), word)
        ):
            command = inner
            found |= set(_variables(command))
    return found


def _variables(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        names = parameter.envvar or ()
        yield from [names] if isinstance(names, str) else names


def files_read(cluster: Cluster, container: Container) -> list[Path]:
    """Return the certificates, tokens and passwords that one of our programs is told to read."""
    kept = re.compile("tls_|tokens$|token_file$|password_file$|checkpoint$")
    try:
        values = parse(cluster, container)
    except click.ClickException:
        return []
    return [v for name, v in values.items() if isinstance(v, Path) and kept.search(name)]
