"""Where a setting comes from, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from hashlens.config import options, setting


@dataclass(frozen=True)
class Settings:
    max_wait_ms: float = setting(2.0, "Longest wait, in milliseconds.")
    listen: str = setting("127.0.0.1:0", "Where to serve.")
    data_dir: Path | None = setting(None, "Where the data is.")
    level: Literal["low", "high"] = setting("low", "How much.")
    eager: bool = setting(False, "Whether to hurry.")


@click.command()
@options(Settings, "demo")
def show(config: Settings) -> None:
    click.echo(repr(config))


def run(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(show, arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.output.strip()


def test_defaults() -> None:
    assert run() == repr(Settings())


def test_the_command_line_goes_before_environment_before_file(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[demo]\nmax_wait_ms = 3\nlisten = "file:1"\nlevel = "high"\n')
    shown = run(
        "--config",
        str(file),
        "--max-wait-ms",
        "5",
        env={"HASHLENS_DEMO_MAX_WAIT_MS": "4", "HASHLENS_DEMO_LISTEN": "env:1"},
    )
    assert shown == repr(Settings(max_wait_ms=5.0, listen="env:1", level="high"))


@click.command()
@options(
    Settings,
    "demo",
    preset_field="level",
    presets={"high": {"max_wait_ms": 9.0, "eager": True, "listen": "high:1"}},
)
def show_preset(config: Settings) -> None:
    click.echo(repr(config))


def run_preset(*arguments: str, env: dict[str, str] | None = None) -> str:
    result = CliRunner().invoke(show_preset, arguments, env=env)
    assert result.exit_code == 0, result.output
    return result.output.strip()


HIGH = Settings(level="high", max_wait_ms=9.0, eager=True, listen="high:1")


def test_a_preset_takes_the_place_of_defaults() -> None:
    assert run_preset() == repr(Settings())
    assert run_preset("--level", "low") == repr(Settings())
    assert run_preset("--level", "high") == repr(HIGH)
    assert run_preset(env={"HASHLENS_DEMO_LEVEL": "high"}) == repr(HIGH)


def test_everything_else_goes_before_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[demo]\nlisten = "file:1"\nmax_wait_ms = 3\n')
    arguments = ["--no-eager", "--level", "high", "--config", str(file)]
    wanted = repr(replace(HIGH, eager=False, listen="file:1", max_wait_ms=4.0))
    env = {"HASHLENS_DEMO_MAX_WAIT_MS": "4"}
    assert run_preset(*arguments, env=env) == wanted
    # Whichever is named first.
    assert run_preset(*arguments[3:], *arguments[:3], env=env) == wanted


def test_the_file_can_name_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[demo]\nlevel = "high"\nmax_wait_ms = 3\n')
    assert run_preset("--config", str(file)) == repr(replace(HIGH, max_wait_ms=3.0))
    env = {"HASHLENS_CONFIG": str(file)}
    assert run_preset(env=env) == repr(replace(HIGH, max_wait_ms=3.0))
    # The command line names another: the file's other values stay.
    assert run_preset("--level", "low", env=env) == repr(Settings(max_wait_ms=3.0))


def test_an_unknown_preset_is_refused() -> None:
    result = CliRunner().invoke(show_preset, ["--level", "middle"])
    assert result.exit_code == 2
    assert "'low', 'high'" in result.output


def test_flags_and_paths(tmp_path: Path) -> None:
    assert run("--eager", "--data-dir", str(tmp_path)) == repr(
        Settings(eager=True, data_dir=tmp_path)
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[demo]\nlistem = 'x'\n", "no listem"),
        ("[demo\n", "not TOML"),
        ("demo = 3\n", "no table"),
        ("[demo]\nlisten = [1]\n", "plain value"),
        ("\xff", "not TOML"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "config.toml"
    file.write_bytes(content.encode("latin-1"))
    result = CliRunner().invoke(show, ["--config", str(file)])
    assert result.exit_code == 2
    assert expected in result.output


def test_help_says_default_and_environment() -> None:
    text = CliRunner().invoke(show, ["--help"]).output
    assert "HASHLENS_DEMO_MAX_WAIT_MS" in text
    assert "Longest wait, in milliseconds." in text
