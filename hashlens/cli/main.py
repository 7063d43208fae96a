"""`hashlens`: one command of its own parts and of what the services add."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points

import click

from hashlens import __version__
from hashlens.cli.collections import collections, drop, replicas
from hashlens.cli.compact import compact
from hashlens.cli.demo import demo
from hashlens.cli.extras import advice_for
from hashlens.cli.health import health
from hashlens.cli.index import index
from hashlens.cli.search import search
from hashlens.cli.text import printable
from hashlens.cli.top.command import top
from hashlens.cli.transfer.export_command import export
from hashlens.cli.transfer.import_command import import_
from hashlens.cli.up import up
from hashlens.cli.verify import verify
from hashlens.errors import HashlensError, InvalidInputError

COMMANDS_GROUP = "hashlens.commands"
"""Entry points that name click commands; a service registers its own."""

INTERRUPTED = 128 + signal.SIGINT


class Cli(click.Group):
    """Finds the services' commands, and turns errors into one line and an exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return our commands, then those of the services."""
        return [*self.commands, *sorted(set(_added()) - set(self.commands))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; one whose packages are missing says so when it is run."""
        if cmd_name in self.commands:
            return self.commands[cmd_name]
        added = _added().get(cmd_name)
        return None if added is None else _load(added)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; nobody but who asks for it sees a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output left, as `head` does. Nothing is to be said, not even by
            # the interpreter when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Exception as error:
            if ctx.params["debug"]:
                traceback.print_exc()
            raise click.ClickException(printable(_explain(error))) from None


def _explain(error: Exception) -> str:
    """Return what went wrong in one line."""
    if isinstance(error, InvalidInputError) and error.field:
        return f"{error.field}: {error.message}"
    if isinstance(error, HashlensError):
        return error.message
    if isinstance(error, ImportError):
        return advice_for(error)
    if isinstance(error, OSError):
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        return f"{where}{error.strerror or error}"
    return (
        f"a defect of Hashlens ({type(error).__name__}: {error}). Please report it with what "
        "`hashlens --debug ...` prints."
    )


def _added() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=COMMANDS_GROUP)}


def _load(entry: EntryPoint) -> click.Command:
    try:
        command = entry.load()
    except (ImportError, AttributeError) as error:
        return _unavailable(entry.name, error)
    assert isinstance(command, click.Command), f"{entry.value} is no click command"
    return command


def _unavailable(name: str, error: Exception) -> click.Command:
    """Return a command in the place of one that cannot be imported."""

    # All of the missing command's arguments are accepted: what they mean is not known.
    @click.command(
        name,
        short_help=f"({_explain(error)})",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True},
    )
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def command(arguments: tuple[str, ...]) -> None:
        raise error

    return command


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hashlens")
@click.option(
    "--debug/--no-debug", envvar="HASHLENS_DEBUG", help="Show the traceback of what goes wrong."
)
def main(debug: bool) -> None:
    """Find similar images by learned binary codes.

    \b
    hashlens up                      start both services; Ctrl-C stops them
    hashlens index ~/Pictures        put a folder of images in
    hashlens search cat.jpg -k 20    find the most similar ones
    """


for command in (
    up,
    index,
    search,
    health,
    top,
    collections,
    replicas,
    compact,
    verify,
    drop,
    export,
    import_,
    demo,
):
    main.add_command(command)
