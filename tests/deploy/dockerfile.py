"""Reads Dockerfiles: the instructions that ours use, and what an image is that they make.

An instruction or a form that is not known here is an error, so that a check never passes over it.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy/docker"
_KNOWN = frozenset(
    {
        *("FROM", "ARG", "ENV", "RUN", "COPY", "LABEL", "WORKDIR", "VOLUME", "USER", "EXPOSE"),
        *("STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT"),
    }
)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continued lines joined."""

    name: str
    value: str
    line: int

    def words(self) -> list[str]:
        """The value of an exec form, or split as a shell does."""
        if self.value.startswith("["):
            return [str(word) for word in json.loads(self.value)]
        return shlex.split(self.value)


@dataclass
class Stage:
    """What is between two FROM."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)


@dataclass
class Image:
    """What an engine knows of an image beside its files."""

    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = "/"
    volumes: list[str] = field(default_factory=list)
    ports: list[int] = field(default_factory=list)
    stop_signal: str = ""
    health: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)


def parse(path: Path) -> list[Instruction]:
    """Read the instructions of a Dockerfile.

    Raises
    ------
    ValueError
        One is not known.
    """
    found: list[Instruction] = []
    begun, begun_at = "", 0
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        begun, begun_at = (begun, begun_at) if begun else ("", number)
        begun += text.removesuffix("\\").rstrip() + " "
        if text.endswith("\\"):
            continue
        name, _, value = begun.strip().partition(" ")
        if name not in _KNOWN:
            raise ValueError(f"{path.name}:{begun_at}: {name} is not known here")
        found.append(Instruction(name, value.strip(), begun_at))
        begun = ""
    if begun:
        raise ValueError(f"{path.name}:{begun_at}: the last line is continued")
    return found


def stages(instructions: list[Instruction]) -> list[Stage]:
    """Split instructions at FROM; variables in it are filled with the ARGs before the first."""
    before: dict[str, str] = {}
    found: list[Stage] = []
    for instruction in instructions:
        if instruction.name == "FROM":
            base, *rest = instruction.words()
            name = rest[1] if len(rest) == 2 and rest[0].upper() == "AS" else ""
            found.append(Stage(expand(base, before), name))
        elif found:
            found[-1].instructions.append(instruction)
        elif instruction.name == "ARG":
            before.update([argument(instruction)])
        else:
            raise ValueError(f"line {instruction.line}: {instruction.name} before FROM")
    return found


def expand(text: str, variables: dict[str, str]) -> str:
    """Fill in variables; one that is not set is empty, as in Dockerfiles."""
    return _VARIABLE.sub(lambda match: variables.get(match[1] or match[2], ""), text)


def argument(instruction: Instruction) -> tuple[str, str]:
    """Name and default of an ARG."""
    (word,) = instruction.words()
    name, _, default = word.partition("=")
    return name, default


def pairs(instruction: Instruction, variables: dict[str, str]) -> dict[str, str]:
    """What an ENV or a LABEL sets."""
    found = {}
    for word in instruction.words():
        name, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"line {instruction.line}: {word} is no NAME=VALUE")
        found[name] = expand(value, variables)
    return found


def apply(image: Image, instruction: Instruction, arguments: dict[str, str]) -> None:
    """Let an image become what an instruction makes of it, its files apart."""
    variables = arguments | image.env
    match instruction.name:
        case "ARG":
            name, default = argument(instruction)
            arguments.setdefault(name, expand(default, variables))
        case "ENV":
            image.env |= pairs(instruction, variables)
        case "LABEL":
            image.labels |= pairs(instruction, variables)
        case "WORKDIR":
            image.workdir = expand(instruction.value, variables)
        case "VOLUME":
            image.volumes += instruction.words()
        case "USER":
            image.user = expand(instruction.value, variables)
        case "EXPOSE":
            image.ports += [int(word) for word in instruction.words()]
        case "STOPSIGNAL":
            image.stop_signal = instruction.value
        case "HEALTHCHECK":
            image.health = json.loads(instruction.value.partition(" CMD ")[2])
        case "ENTRYPOINT":
            image.entrypoint = json.loads(instruction.value)


def image_of(path: Path, path_variable: str = "/usr/local/bin:/usr/bin:/bin") -> Image:
    """What the last stage of a Dockerfile makes, its files apart."""
    image = Image(env={"PATH": path_variable})
    arguments: dict[str, str] = {}
    for instruction in stages(parse(path))[-1].instructions:
        apply(image, instruction, arguments)
    return image


def context(ignore_file: Path) -> list[Path]:
    """The files of the repository that a build sees, by a file of patterns.

    Patterns are ``*``, ``!PATH`` (that file, or all below that directory) and ``**/NAME`` (whatever
    has that name, and all below it).
    """
    kept: set[Path] = set()
    for line in ignore_file.read_text("utf-8").splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        if pattern == "*":
            kept.clear()
        elif pattern.startswith("!"):
            path = ROOT / pattern[1:]
            kept |= {path} if path.is_file() else {p for p in path.rglob("*") if p.is_file()}
        elif pattern.startswith("**/"):
            kept = {p for p in kept if pattern[3:] not in p.relative_to(ROOT).parts}
        else:
            raise ValueError(f"{ignore_file.name}: {pattern} is a pattern that is not known here")
    return sorted(kept)
