"""Root file systems of images, made by a Dockerfile's own steps, without a container engine.

A root is this machine's own, read-only, with layers above (an overlay file system): what a step
writes goes there. In place of the base image, which has Python in /usr/local, stands a copy of the
Python that runs this. Steps run in a chroot. Needs root and Linux.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.dockerfile import ROOT, Image, Instruction, Stage, apply, context

BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
STEP_S = 900.0
NEW_MOUNTS, NEW_NETWORK = 0x00020000, 0x40000000
_HERE = ("PIP_", "UV_", "SSL_", "REQUESTS_", "HTTP_", "HTTPS_", "NO_", "http", "https", "no_")
"""How this machine reaches its package index, by the beginning of variables' names."""


def unshare(kinds: int) -> None:
    """Part from the machine's mounts or network; nothing that is done after it is seen outside."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(kinds):
        raise OSError(ctypes.get_errno(), "unshare")
    if kinds & NEW_MOUNTS:
        call("mount", "--make-rprivate", "/")


def call(*command: str | Path) -> None:
    """Run a program of the system; its error is ours."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}: {done.stderr.strip()}")


def copy_tree(source: Path, target: Path) -> None:
    """Copy a tree, as hard links where that can be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        call("cp", "-al", source, target)
    except RuntimeError:
        shutil.rmtree(target, ignore_errors=True)
        call("cp", "-a", source, target)


@dataclass
class Root:
    """A stage's files: its own layer, and those below, from the upper to the lower."""

    at: Path
    below: list[Path]
    machine: Path
    image: Image = field(default_factory=lambda: Image(env={"PATH": BASE_PATH}))
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def layer(self) -> Path:
        return self.at / "layer"

    def find(self, path: str) -> Path:
        """Where a file of an image lies on this machine; what is only the machine's is not."""
        for layer in (self.layer, *self.below):
            if (layer / path.lstrip("/")).exists():
                return layer / path.lstrip("/")
        raise FileNotFoundError(path)

    @contextmanager
    def mounted(
        self, *, read_only: bool = False, binds: dict[str, Path] | None = None
    ) -> Iterator[Path]:
        """Mount it: with the devices, an empty /tmp, and directories or files of this machine."""
        merged, work = self.at / "merged", self.at / "work"
        for directory in (merged, work, self.layer):
            directory.mkdir(parents=True, exist_ok=True)
        for inside, outside in (binds or {}).items():
            _mount_point(self.layer / inside.lstrip("/"), is_directory=outside.is_dir())
        layers = ":".join(map(str, [*self.below, self.machine]))
        options = f"lowerdir={layers},upperdir={self.layer},workdir={work}"
        with ExitStack() as mounts:
            call("mount", "-t", "overlay", "overlay", "-o", options, merged)
            mounts.callback(call, "umount", "--lazy", merged)
            call("mount", "--rbind", "/dev", merged / "dev")
            call("mount", "-t", "proc", "proc", merged / "proc")
            # Neither the sources nor another Python are to be found by chance.
            hidden = [Path("/tmp"), Path("/dev/shm"), ROOT]
            if sys.base_prefix not in ("/usr", "/usr/local"):
                hidden.append(Path(sys.base_prefix))
            for path in hidden:
                if (inside_path := merged / str(path).lstrip("/")).is_dir():
                    call("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", inside_path)
            if read_only:
                call("mount", "-o", "remount,ro,bind", merged)
            for inside, outside in (binds or {}).items():
                call("mount", "--bind", outside, merged / inside.lstrip("/"))
            yield merged

    def step(self, command: list[str]) -> str:
        """Run a command of a build and return what it printed.

        Raises
        ------
        RuntimeError
            It failed.
        """
        env = {name: value for name, value in os.environ.items() if name.startswith(_HERE)}
        # Here may be a compiler; in the base image there is none.
        env |= {"HOME": "/root", "CC": "/bin/false", "CXX": "/bin/false"}
        env |= {k: value for k, value in self.arguments.items() if value or k not in env}
        with self.mounted() as merged:
            done = subprocess.run(
                [
                    *("chroot", str(merged), "sh", "-c", 'cd "$0" && exec "$@"'),
                    *(self.image.workdir, *command),
                ],
                env=env | self.image.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=STEP_S,
                check=False,
            )
        if done.returncode:
            raise RuntimeError(f"{command[-1]}\n{done.stdout[-3000:]}")
        return done.stdout


def _mount_point(path: Path, *, is_directory: bool) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if is_directory:
        path.mkdir()
    else:
        path.touch()


def base(at: Path, *, use_uv: bool) -> Root:
    """What stands for the base image: Python as `python` in /usr/local, with pip or uv as `pip`."""
    # No layer may lie below another of the same mount: the root of the machine is mounted anew.
    machine, work = at / "machine", at / "machine-work"
    for directory in (machine, work, at / "machine-layer"):
        directory.mkdir(parents=True)
    options = f"lowerdir=/,upperdir={at / 'machine-layer'},workdir={work}"
    call("mount", "-t", "overlay", "overlay", "-o", options, machine)
    root = Root(at, [], machine)
    local = root.layer / "usr/local"
    if sys.base_prefix in ("/usr", "/usr/local"):
        (local / "bin").mkdir(parents=True)
        (local / "bin/python").symlink_to(Path(sys.base_prefix) / "bin/python3")
    else:
        copy_tree(Path(sys.base_prefix), local)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for installed in (local / "lib" / version / "site-packages").iterdir():
            if not installed.name.startswith("pip"):
                call("rm", "-rf", installed)
        # Else a libpython of the system's would be found, of another version.
        root.step(["ldconfig"])
    pip = local / "bin/pip"
    pip.unlink(missing_ok=True)
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None or not use_uv:
        pip.write_text('#!/bin/sh\nexec /usr/local/bin/python -m pip "$@"\n')
    else:
        # The same steps by `uv pip`: the wheels that were fetched before become hard links.
        shutil.copy2(uv, local / "bin/uv")
        pip.write_text('#!/bin/sh\nUV_COMPILE_BYTECODE=1 exec /usr/local/bin/uv pip "$@"\n')
        cache = subprocess.run([uv, "cache", "dir"], capture_output=True, text=True, check=True)
        if Path(cache.stdout.strip()).is_dir():
            copy_tree(Path(cache.stdout.strip()), root.at / "cache")
    pip.chmod(0o755)
    return root


def build(stages: list[Stage], at: Path, first: Root, ignore_file: Path) -> Root:
    """Do what the stages of a Dockerfile say, and return the last one's root."""
    made: dict[str, Root] = {}
    files = context(ignore_file)
    root = first
    for number, stage in enumerate(stages):
        under = made.get(stage.base, first)
        root = Root(
            at / f"{number}-{stage.name or 'final'}", [under.layer, *under.below], first.machine
        )
        root.image.env = dict(under.image.env)
        root.image.workdir = under.image.workdir
        root.arguments = dict(under.arguments)
        made[stage.name] = root
        root.layer.mkdir(parents=True)
        if (first.at / "cache").is_dir() and any(
            "pip install -c" in i.value for i in stage.instructions
        ):
            # In this very layer: a file of a layer below would be copied instead of linked.
            copy_tree(first.at / "cache", root.layer / "root/.cache/uv")
        for instruction in stage.instructions:
            _do(root, instruction, files, made)
    return root


def _do(root: Root, instruction: Instruction, files: list[Path], made: dict[str, Root]) -> None:
    apply(root.image, instruction, root.arguments)
    if instruction.name == "RUN" and "apt-get" not in instruction.value:
        root.step(["sh", "-c", instruction.value])
    elif instruction.name == "WORKDIR":
        _mount_point(root.layer / root.image.workdir.lstrip("/"), is_directory=True)
    elif instruction.name == "COPY":
        words = instruction.words()
        options = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        *sources, target = [word for word in words if not word.startswith("--")]
        if not target.startswith("/"):
            target = f"{root.image.workdir}/{target}"
        into = root.layer / target.lstrip("/")
        if unknown := options.keys() - {"from", "chmod"}:
            raise ValueError(f"line {instruction.line}: {unknown} is not known here")
        if "from" in options:
            copy_tree(made[options["from"]].find(sources[0]), into)
            return
        for source in sources:
            copied = _copy(ROOT / source, into, files, into_directory=target.endswith("/"))
            if "chmod" in options:
                for path in copied:
                    path.chmod(int(options["chmod"], 8))


def _copy(source: Path, into: Path, files: list[Path], *, into_directory: bool) -> list[Path]:
    """Copy a file, or all in a directory, of what the build sees; return what was made."""
    chosen = [p for p in files if p == source or source in p.parents]
    if not chosen:
        raise FileNotFoundError(f"{source.relative_to(ROOT)} is not in the build's context")
    made: list[Path] = []
    for path in chosen:
        if path == source:
            target = into / path.name if into_directory else into
        else:
            target = into / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
        made.append(target)
    return made
