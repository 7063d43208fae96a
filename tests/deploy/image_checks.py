"""What an image of `tests.deploy.images` holds, and what a process of it may do."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

from tests.deploy.container import Container
from tests.deploy.dockerfile import ROOT
from tests.deploy.image_root import Root

BASE_PACKAGES = frozenset({"libc6", "libgcc-s1", "libstdc++6", "zlib1g"})
"""Packages of shared libraries that the base image has."""
DRIVER = re.compile(r"lib(cuda|nvidia-ml|nvcuvid|nvidia-encode)\.so\.1")
"""What the container runtime mounts where a GPU is given."""
PYTHON_PACKAGES = frozenset(
    {"libbz2-1.0", "libffi8", "liblzma5", "libsqlite3-0", "libssl3", "libuuid1"}
)
"""And of those that Python's own modules load there."""
WHERE_THERE_IS_ONE = frozenset({"libfribidi0"})
"""Pillow's, to write text into pictures."""
NEVER_LOADED = re.compile(
    # CUDA between machines; a leftover of PyTorch's that nothing needs; Numba's other threading
    # layer: the kernels take OpenMP's, in libgomp.
    r"libcufile_rdma|nvshmem_(transport|bootstrap)_|libgfortran\.so\.5$|tbbpool"
)

EVERYWHERE = ("/", "/etc", "/opt/hashlens", "/opt/venv", "/var", "/var/tmp", "/home", "/run")
LISTING = """
import importlib.metadata, json
print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))
"""
WRITES = """
import os, sys, tempfile
for path in sys.argv[1:]:
    try:
        tempfile.TemporaryFile(dir=path).close()
        print(path, "yes")
    except OSError:
        print(path, "no")
"""


class Report:
    """Lines of what was checked."""

    def __init__(self) -> None:
        self.n_failed = 0

    def line(self, image: str, what: str, ok: bool, detail: str = "") -> None:
        """Print one."""
        self.n_failed += not ok
        print(f"{'ok  ' if ok else 'FAIL'}  {image:8}  {what:58}  {detail}".rstrip(), flush=True)


def look(report: Report, name: str, root: Root, packages: list[str]) -> None:
    """Compare what an image holds with what was meant."""
    installed = json.loads(root.step(["python", "-c", LISTING]))
    versions = {
        re.sub("[-_.]+", "-", package).lower(): version
        for package, _, version in (
            line.partition("==")
            for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        )
    }
    others = [
        f"{package} {version}"
        for package, version in installed.items()
        if package != "hashlens"
        and versions.get(re.sub("[-_.]+", "-", package).lower()) != version.partition("+")[0]
    ]
    held = f"{len(installed)} packages"
    report.line(
        name, "every version is that of constraints.txt", not others, ", ".join(others) or held
    )
    cuda = [package for package in installed if package.startswith("nvidia-")]
    if name == "search":
        heavy = [p for p in installed if p in ("torch", "torchvision", "triton", *cuda)]
        report.line(name, "no torch, no CUDA", not heavy, ", ".join(heavy))
    else:
        toolkit = list(root.layer.glob("usr/local/cuda*"))
        report.line(name, "no CUDA toolkit", not toolkit, f"{len(cuda)} packages of wheels")
    tools = [p for p in installed if p in ("pip", "uv", "hatchling")]
    report.line(name, "no tools of the build in it", not tools, ", ".join(tools))
    missing = libraries(root, {*packages, *BASE_PACKAGES})
    detail = ", ".join(sorted(missing)) or f"of {', '.join(sorted({*packages, *BASE_PACKAGES}))}"
    report.line(name, "shared libraries are in the image", not missing, detail)


def libraries(root: Root, packages: set[str]) -> set[str]:
    """Shared libraries that the wheels need, and neither they nor these packages have."""
    venv = root.find("/opt/venv")
    bundled = {p.name for p in venv.rglob("*.so*")}
    files = [
        p
        for p in venv.rglob("*.so*")
        if p.is_file() and not p.is_symlink() and not NEVER_LOADED.match(p.name)
    ]
    listing = ""
    for begin in range(0, len(files), 200):
        command = ["readelf", "-d", *map(str, files[begin : begin + 200])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        listing += done.stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing)) - bundled
    return {
        f"{library} ({', '.join(sorted(owners)) or 'nobody'})"
        for library in needed
        if not DRIVER.fullmatch(library)
        and "python" not in library
        and not (owners := owners_of(f"*/{library}")) & packages
    }


def owners_of(pattern: str) -> set[str]:
    """Debian packages that have such a file."""
    done = subprocess.run(["dpkg", "-S", pattern], capture_output=True, text=True, check=False)
    return {line.partition(":")[0] for line in done.stdout.splitlines()}


def loaded(report: Report, name: str, mounted: Container, pid: int, packages: set[str]) -> None:
    """What a process has loaded that is not the image's own belongs to a package of the image."""
    maps = Path(f"/proc/{pid}/maps").read_text("utf-8")
    files = {line.split()[-1].removeprefix(str(mounted.merged)) for line in maps.splitlines()}
    libraries_of_system = {
        Path(f).name for f in files if ".so" in f and not f.startswith(("/opt/", "/usr/local/"))
    }
    allowed = packages | BASE_PACKAGES | PYTHON_PACKAGES | WHERE_THERE_IS_ONE
    foreign = {
        library for library in libraries_of_system if not owners_of(f"*/{library}") & allowed
    }
    detail = ", ".join(sorted(foreign)) or f"{len(libraries_of_system)} of the system"
    report.line(name, "what it has loaded is in the image", not foreign, detail)


def writes(
    report: Report,
    name: str,
    mounted: Container,
    process: subprocess.Popen[bytes],
    service: dict[str, Any],
) -> None:
    """A service's process is nobody's, and can write where it was declared and nowhere else."""
    status = Path(f"/proc/{process.pid}/status").read_text("utf-8")
    ids = set(re.findall(r"^[UG]id:\t(\d+)\t(\d+)\t(\d+)\t(\d+)$", status, re.MULTILINE))
    rights = set(re.findall(r"^Cap(?:Prm|Eff|Bnd):\t(\w+)$", status, re.MULTILINE))
    ok = ids == {tuple(["10001"] * 4)} and rights == {"0" * 16}
    report.line(name, "runs as 10001:10001 without capabilities", ok)
    declared = {volume.split(":")[1] for volume in service.get("volumes", [])}
    declared |= {path.partition(":")[0] for path in service["tmpfs"]}
    tried = {*EVERYWHERE, *declared}
    done = mounted.run(["python", "-c", WRITES, *sorted(tried)])
    said = dict(line.split() for line in done.stdout.splitlines())
    written = {path for path, can in said.items() if can == "yes"}
    ok = said.keys() == tried and written == declared
    report.line(name, "writes where it is declared, nowhere else", ok, " ".join(sorted(written)))
