"""``python -m tests.deploy.images``: what the images of deploy/docker rely on, executed.

There need not be a container engine. Each Dockerfile's steps are carried out as they stand, in a
root file system of their own and a fresh virtual environment; then compose.yaml is: both services
run, read-only and as their user. apt's packages are looked up, not installed. Needs root, on Linux.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml
from PIL import Image as Picture

from tests.deploy import image_root
from tests.deploy.container import Container, container, loopback_up, stop
from tests.deploy.dockerfile import DOCKER, ROOT, Instruction, parse, stages
from tests.deploy.image_checks import Report, loaded, look, writes
from tests.deploy.image_root import Root

START_S = 300.0
STOP_S = 45.0


def main() -> int:
    """Build and check both, run compose.yaml; 0 if all is as it should be."""
    parser = argparse.ArgumentParser(prog="python -m tests.deploy.images")
    parser.add_argument("--only", choices=["search", "encoder"], help="build and check this image")
    parser.add_argument("--keep", action="store_true", help="leave build/images as it is then")
    parser.add_argument("--pip", action="store_true", help="install with pip, also if uv is here")
    asked = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0:
        print("images-check needs root on Linux: roots are mounted, users are changed")
        return 2
    at = ROOT / "build/images"
    remove(at)
    # In a child, whose mounts are gone with it before anything is removed.
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        if not asked.keep:
            remove(at)
        return os.waitstatus_to_exitcode(status)
    status = 1
    try:
        status = check(at, asked.only, use_uv=not asked.pip)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def remove(at: Path) -> None:
    """Remove what was built, and nothing that is mounted there."""
    image_root.call("rm", "-rf", "--one-file-system", at)


def check(at: Path, only: str | None, *, use_uv: bool) -> int:
    """Build and check; return the exit status."""
    image_root.unshare(image_root.NEW_MOUNTS)
    report = Report()
    base = image_root.base(at / "base", use_uv=use_uv)
    roots = {
        name: root
        for name in ("search", "encoder")
        if only in (None, name) and (root := build(report, name, at / name, base))
    }
    image_root.unshare(image_root.NEW_NETWORK)
    loopback_up()
    if len(roots) == 2:
        with ExitStack() as cleanup:
            cleanup.callback(give_secrets_back, make_secrets())
            compose(report, roots, at)
    elif only is None:
        report.line("both", "compose.yaml runs", False, "not tried: an image is missing")
    print(f"{report.n_failed} failed" if report.n_failed else "all as it should be")
    return 1 if report.n_failed else 0


def build(report: Report, name: str, at: Path, base: Root) -> Root | None:
    """Carry out a Dockerfile, and look at what it made."""
    path = DOCKER / f"{name}.Dockerfile"
    instructions = parse(path)
    packages = of_debian(instructions)
    for package in packages:
        policy = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True)
        candidate = re.search(r"Candidate: (\S+)", policy.stdout)
        found = candidate is not None and candidate[1] != "(none)"
        report.line(name, f"Debian has {package}", found, candidate[1] if candidate else "")
    began_s = time.monotonic()
    try:
        root = image_root.build(
            stages(instructions), at, base, path.with_name(f"{path.name}.dockerignore")
        )
    except (RuntimeError, FileNotFoundError, ValueError) as error:
        report.line(name, "its steps succeed", False, str(error))
        return None
    n_steps = sum(i.name == "RUN" and "apt-get" not in i.value for i in instructions)
    took = f"{n_steps} RUN in {time.monotonic() - began_s:.0f} s"
    report.line(name, "its steps succeed", True, took)
    look(report, name, root, packages)
    return root


def of_debian(instructions: list[Instruction]) -> list[str]:
    """The packages that are installed with apt-get."""
    return [
        word
        for instruction in instructions
        if "apt-get" in instruction.value
        for word in instruction.value.partition(" install ")[2].partition("&&")[0].split()
        if not word.startswith("-")
    ]


def make_secrets() -> Path | None:
    """Make the secrets by the script that README.md names; what is there already is put aside."""
    kept = DOCKER / "secrets"
    aside = kept.rename(DOCKER / "secrets.aside") if kept.exists() else None
    subprocess.run([str(DOCKER / "make-secrets.sh")], check=True, stdout=subprocess.DEVNULL)
    return aside


def give_secrets_back(aside: Path | None) -> None:
    """Undo `make_secrets`."""
    shutil.rmtree(DOCKER / "secrets")
    if aside is not None:
        aside.rename(DOCKER / "secrets")


def compose(report: Report, roots: dict[str, Root], at: Path) -> None:
    """Run compose.yaml on what was built: Redis, both services, a first search, the end."""
    described = yaml.safe_load((DOCKER / "compose.yaml").read_text("utf-8"))
    services: dict[str, Any] = described["services"]
    for name, root in roots.items():
        hosts = root.layer / "etc/hosts"
        hosts.write_text(f"127.0.0.1 localhost {' '.join(services)}\n")
        refuses(report, name, root, services[name], at)
    roots = roots | {"redis": redis_root(roots["search"], at)}
    for attempt in ("first", "second"):
        with ExitStack() as stack:
            running: dict[str, tuple[Container, subprocess.Popen[bytes]]] = {}
            for name in ("redis", "encoder", "search"):
                mounted = stack.enter_context(
                    container(roots[name], services[name], described["secrets"], at, name)
                )
                process = mounted.start()
                running[name] = mounted, process
                stack.callback(stop, process, "SIGKILL", STOP_S)
                try:
                    seconds = mounted.wait_healthy(process, START_S)
                except RuntimeError as error:
                    report.line(name, f"is healthy, {attempt} start", False, str(error))
                    return
                report.line(name, f"is healthy, {attempt} start", True, f"after {seconds:.1f} s")
                if attempt == "first" and name != "redis":
                    writes(report, name, mounted, process, services[name])
            kernels = Path(roots["search"].image.env["NUMBA_CACHE_DIR"])
            kept = list((running["search"][0].merged / kernels.relative_to("/")).rglob("*.nbc"))
            report.line("search", "kernels are kept for the next start", bool(kept))
            search(report, running["search"][0], index=attempt == "first")
            for name in ("search", "encoder") if attempt == "first" else ():
                packages = set(of_debian(parse(DOCKER / f"{name}.Dockerfile")))
                loaded(report, name, running[name][0], running[name][1].pid, packages)
            for name in ("search", "encoder", "redis"):
                status = stop(running[name][1], roots[name].image.stop_signal or "SIGTERM", STOP_S)
                report.line(
                    name, f"SIGTERM ends it, {attempt} time", status == 0, f"status {status}"
                )


def refuses(report: Report, name: str, root: Root, service: dict[str, Any], at: Path) -> None:
    """The image by itself listens nowhere before it was told how."""
    bare = {"read_only": True, "volumes": service.get("volumes", []), "tmpfs": service["tmpfs"]}
    with container(root, bare, {}, at / "bare", name) as mounted:
        done = mounted.run(mounted.command)
        ok = done.returncode == 2 and "--insecure" in done.stdout
        detail = "" if ok else done.stdout[-500:]
        report.line(name, "without certificate or --insecure it does not start", ok, detail)


def redis_root(search: Root, at: Path) -> Root:
    """What stands for the image of Redis: the server that comes with the search service."""
    root = Root(at / "redis", [search.layer, *search.below], search.machine)
    local = root.layer / "usr/local/bin"
    local.mkdir(parents=True)
    server = next(search.find("/opt/venv").rglob("_binaries/*/valkey-server"))
    shutil.copy2(server, local / "valkey-server")
    client = shutil.which("valkey-cli") or shutil.which("redis-cli")
    if client is None:
        raise RuntimeError("the check of Redis's health needs valkey-cli or redis-cli")
    (local / "valkey-cli").symlink_to(client)
    (root.layer / "data").mkdir()
    os.chown(root.layer / "data", 999, 999)
    root.image.workdir = "/data"
    return root


def search(report: Report, mounted: Container, *, index: bool) -> None:
    """What README.md shows: index a few pictures, search for one of them."""
    pictures = mounted.merged / "tmp/pictures"
    pictures.mkdir()
    for i in range(8):
        Picture.linear_gradient("L").rotate(45 * i).save(pictures / f"{i}.png")
    where = ["--search", "search:50052", "--encoder", "encoder:50051", "--insecure"]
    if index:
        done = mounted.run(["hashlens", "index", "/tmp/pictures", *where])
        report.line(
            "search", "`hashlens index` in its image", not done.returncode, last(done.stdout)
        )
    done = mounted.run(["hashlens", "search", "/tmp/pictures/3.png", "-k", "3", *where])
    found = done.returncode == 0 and "3.png" in done.stdout
    what = "the first search" if index else "after a restart a search"
    report.line("search", f"{what} finds the picture", found, "" if found else done.stdout)


def last(text: str) -> str:
    """The last line that is not empty."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
