from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hashlens.cli import main as main_module
from hashlens.cli.extras import EXTRAS, advice_for, require
from hashlens.cli.main import main
from hashlens.errors import InvalidInputError, PreconditionError, UnavailableError


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


@pytest.fixture
def nowhere() -> Iterator[list[str]]:
    """Options that point at a port where nobody listens, and nobody else can."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{s.getsockname()[1]}"
        yield ["--search", target, "--encoder", target]


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Add a command `fail` that raises."""

    @click.command("fail")
    def fail() -> None:
        raise error

    monkeypatch.setitem(main.commands, "fail", fail)


def test_help_names_every_command_with_a_line(runner: CliRunner) -> None:
    result = runner.invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("up", "index", "search", "health", "collections", "drop", "export", "import"):
        assert f"\n  {name} " in result.output


@pytest.mark.parametrize(
    "name", ["up", "index", "search", "health", "collections", "drop", "export", "import", "demo"]
)
def test_every_command_has_help(runner: CliRunner, name: str) -> None:
    result = runner.invoke(main, [name, "--help"])
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UnavailableError("Redis is away"), "Error: Redis is away\n"),
        (
            InvalidInputError("k is 0", field="options.k"),
            "Error: options.k: k is 0\n",
        ),
        (
            PermissionError(13, "Permission denied", "/root/x"),
            "Error: /root/x: Permission denied\n",
        ),
        (ModuleNotFoundError("no torch", name="torch"), "pip install 'hashlens[encoder]'\n"),
        (ZeroDivisionError("oops"), "a defect of Hashlens (ZeroDivisionError: oops)"),
        (UnavailableError("two\nlines \x1b[31m"), "Error: two\\nlines \\x1b[31m\n"),
    ],
)
def test_an_error_is_one_line_and_exit_status_1(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    raising(monkeypatch, error)
    result = runner.invoke(main, ["fail"])
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_debug_shows_the_traceback(runner: CliRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, UnavailableError("gone"))
    assert "Traceback" in runner.invoke(main, ["--debug", "fail"]).stderr
    assert "Traceback" in runner.invoke(main, ["fail"], env={"HASHLENS_DEBUG": "1"}).stderr
    assert "Traceback" not in runner.invoke(main, ["fail"]).stderr


def test_an_interrupt_is_exit_status_130(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    result = runner.invoke(main, ["fail"])
    assert result.exit_code == 130
    assert result.stderr == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [["bogus"], ["search"], ["search", "--id", "a", __file__], ["search", "-k", "0", "--id", "a"]],
)
def test_wrong_usage_is_exit_status_2(runner: CliRunner, arguments: list[str]) -> None:
    assert runner.invoke(main, arguments).exit_code == 2


@pytest.mark.parametrize(
    "arguments", [["collections"], ["search", "--id", "a"], ["drop", "x", "--yes"]]
)
def test_services_that_are_away_are_named(
    runner: CliRunner, nowhere: list[str], arguments: list[str]
) -> None:
    result = runner.invoke(main, [*arguments, *nowhere])
    assert result.exit_code == 1
    assert "hashlens up" in result.stderr
    assert nowhere[1] in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_query_that_is_no_file_is_not_read(runner: CliRunner, nowhere: list[str]) -> None:
    result = runner.invoke(main, ["search", "/dev/zero", *nowhere])
    assert result.exit_code == 1
    assert "is no file" in result.output


def test_index_names_services_that_are_away(
    runner: CliRunner, nowhere: list[str], tmp_path: Path
) -> None:
    result = runner.invoke(main, ["index", str(tmp_path), *nowhere])
    assert result.exit_code == 1
    assert "hashlens up" in result.stderr


def test_health_of_nothing(runner: CliRunner, nowhere: list[str]) -> None:
    result = runner.invoke(main, ["health", *nowhere])
    assert result.exit_code == 1
    assert "Connection refused" in result.stdout
    assert "hashlens up" in result.stderr


def test_a_service_command_whose_packages_are_missing_spoils_nothing(
    runner: CliRunner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needs_torch.py").write_text("raise ModuleNotFoundError('none', name='torch')")
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("bench", "needs_torch:bench", main_module.COMMANDS_GROUP)
    monkeypatch.setattr(main_module, "_added", lambda: {"bench": entry})

    listed = runner.invoke(main, ["--help"])
    assert listed.exit_code == 0
    assert "needs torch" in listed.output
    for arguments in (["bench"], ["bench", "encode", "--help", "-x", "1"]):
        used = runner.invoke(main, arguments)
        assert used.exit_code == 1
        assert used.stderr == "Error: needs torch: pip install 'hashlens[encoder]'\n"


def test_require_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    require("encoder", "search", purpose="x")
    monkeypatch.setitem(EXTRAS, "search", ("numba", "no_such_module"))
    with pytest.raises(PreconditionError, match=r"x needs no_such_module: .*hashlens\[search\]"):
        require("encoder", "search", purpose="x")


def test_advice_for_another_import() -> None:
    assert "cannot be imported" in advice_for(ImportError("broken"))


def test_the_reader_of_our_output_may_leave() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from hashlens.cli.main import main; main()", "--help"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    _, stderr = process.communicate(timeout=60)
    assert stderr == b""
