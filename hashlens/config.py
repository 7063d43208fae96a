"""Configuration: a frozen dataclass becomes command-line options, environment and file.

A field of a configuration class is declared with `setting`; `options` turns the class into click
options. Precedence: command line, then environment (``HASHLENS_<SECTION>_<FIELD>``), then the TOML
file given by ``--config`` (table ``[<section>]``), then the preset that a field names, then the
default.
"""

from __future__ import annotations

import dataclasses
import functools
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from hashlens.errors import InvalidInputError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def setting(default: Any, help: str, *, secret: bool = False) -> Any:  # noqa: A002 - click's word
    """Declare a field of a configuration class.

    Parameters
    ----------
    default
        Used when nothing else says.
    help
        One sentence for the command line; names the unit unless the field's name does.
    secret
        The value may hold a secret: the configuration's `repr` leaves it out.
    """
    return dataclasses.field(default=default, repr=not secret, metadata={"help": help})


def options(
    cls: type[T],
    section: str,
    *,
    preset_field: str = "",
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Callable[[F], F]:
    """Return a decorator that gives a click command an option for each field of `cls`.

    The command receives one argument, `config`, an instance of `cls`, beside its own.

    Parameters
    ----------
    cls
        A dataclass whose fields are declared with `setting`.
    section
        Table of the TOML file, and part of the environment variables' names.
    preset_field
        Field whose value names one of `presets`; empty for none.
    presets
        By that value, defaults that take the place of the class's own.
    """
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def command(**values: Any) -> Any:
            chosen = {field.name: values.pop(field.name) for field in fields}
            try:
                config = cls(**chosen)
            except InvalidInputError as error:
                raise click.UsageError(error.message) from None
            return function(config=config, **values)

        for field in reversed(fields):
            kind, optional = _parameter_type(hints[field.name])
            flag = "--" + field.name.replace("_", "-")
            chooses = field.name == preset_field
            command = click.option(
                f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
                field.name,
                type=None if kind is bool else kind,
                default=field.default,
                show_default=not (optional and field.default is None),
                envvar=f"HASHLENS_{section}_{field.name}".upper(),
                show_envvar=True,
                help=field.metadata["help"],
                # Before the others, whose defaults it decides.
                is_eager=chooses,
                callback=functools.partial(_use_preset, presets=presets or {}) if chooses else None,
            )(command)
        config_file = click.option(
            "--config",
            "_config_file",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            expose_value=False,
            callback=functools.partial(_read_file, section=section, fields=fields),
            envvar="HASHLENS_CONFIG",
            help=f"TOML file; the table [{section}] sets these options.",
        )
        return typing.cast(F, config_file(command))

    return decorate


def _parameter_type(hint: Any) -> tuple[Any, bool]:
    """Return click's type for an annotation, and whether None is allowed."""
    members = [m for m in typing.get_args(hint) if m is not types.NoneType]
    optional = isinstance(hint, types.UnionType)
    kind = members[0] if optional else hint
    if typing.get_origin(kind) is typing.Literal:
        return click.Choice(typing.get_args(kind)), optional
    return (click.Path(path_type=Path) if kind is Path else kind), optional


def _use_preset(
    context: click.Context,
    parameter: click.Parameter,
    value: str,
    *,
    presets: Mapping[str, Mapping[str, Any]],
) -> str:
    """Make the preset click's defaults, below those of the file."""
    context.default_map = {**presets.get(value, {}), **(context.default_map or {})}
    return value


def _read_file(
    context: click.Context,
    parameter: click.Parameter,
    path: Path | None,
    *,
    section: str,
    fields: tuple[dataclasses.Field[Any], ...],
) -> None:
    """Make the file's table click's defaults, refusing what no field is called."""
    if path is None:
        return
    try:
        table = tomllib.loads(path.read_text("utf-8")).get(section, {})
        if not isinstance(table, dict):
            raise click.BadParameter(f"{path}: [{section}] is no table", context, parameter)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{path} is not TOML: {error}", context, parameter) from None
    unknown = sorted(set(table) - {field.name for field in fields})
    if unknown:
        raise click.BadParameter(
            f"{path}: [{section}] has no {', '.join(unknown)}", context, parameter
        )
    for name, value in table.items():
        if not isinstance(value, str | int | float):
            raise click.BadParameter(
                f"{path}: {name} in [{section}] is no plain value", context, parameter
            )
    context.default_map = {**(context.default_map or {}), **table}
