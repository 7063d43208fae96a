"""What docs/operations.md tells people to run on the way to a cluster, but for the cluster."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import redis
import yaml

from hashlens.rpc.scopes import Scope
from hashlens.rpc.tokens import parse_tokens
from search_service.storage.embedded import find_server
from tests.support.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

KUBECTL = """#!/bin/sh
echo "kubectl $*" >> "$CALLS"
test "$1" = apply && cat > /dev/null
exit 0
"""


def block_with(text: str) -> str:
    (block,) = [block for block in BLOCKS if text in block]
    return str(block)


def run(block: str, folder: Path) -> list[str]:
    """Run a block where `kubectl` only notes how it was called; return these calls."""
    if shutil.which("openssl") is None:
        pytest.skip("the page's commands need openssl")
    tools = folder / "tools"
    tools.mkdir()
    (tools / "kubectl").write_text(KUBECTL)
    (tools / "kubectl").chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    done = subprocess.run(
        ["bash", "-euc", block],
        cwd=folder,
        env={"PATH": f"{tools}:{os.environ['PATH']}", "CALLS": str(calls)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """What the block of step 3 makes, and its calls of kubectl."""
    folder = tmp_path_factory.mktemp("step3")
    calls = run(block_with("mkdir -p hashlens-secrets"), folder)
    return folder / "hashlens-secrets", calls


def test_tokens_are_those_whose_hashes_the_services_get(secrets: tuple[Path, list[str]]) -> None:
    folder, _ = secrets
    grants = parse_tokens((folder / "tokens").read_bytes())
    assert [(g.scope, g.name) for g in grants] == [
        (Scope.READ, "search"),
        (Scope.ADMIN, "replicas"),
        (Scope.ADMIN, "client"),
        (Scope.WRITE, "bulk-encode"),
    ]
    plain = [(folder / name).read_text() for name in ("encoder", "peer", "client", "bulk")]
    assert len(set(plain)) == 4
    assert not any(token in (folder / "tokens").read_text() for token in plain)
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


def test_the_secrets_are_those_that_pods_mount(secrets: tuple[Path, list[str]]) -> None:
    _, calls = secrets
    made = {
        words[words.index("generic") + 1]: re.findall(r"--from-file=(\S+)", " ".join(words))
        for words in (call.split() for call in calls)
        if "generic" in words
    }
    assert made == {
        "tokens": ["tokens"],
        "search-credentials": [
            "encoder-token=encoder",
            "peer-token=peer",
            "redis-password=redis",
        ],
        "redis-acl": ["users.acl"],
        "bulk-encode-token": ["token=bulk"],
    }


def test_redis_takes_the_acl(secrets: tuple[Path, list[str]]) -> None:
    folder, _ = secrets
    password = (folder / "redis").read_text()
    with RedisServer(find_server(), aclfile=str(folder / "users.acl")) as server:
        with server.client() as nobody:
            assert nobody.ping()
            with pytest.raises(redis.exceptions.NoPermissionError):
                nobody.get("hl:collections")
        with redis.Redis(
            unix_socket_path=str(server.socket), username="hashlens", password=password, protocol=2
        ) as client:
            assert client.smembers("hl:collections") == set()
            assert client.config_get("appendfsync")


def test_the_acl_is_the_one_of_the_section_on_redis() -> None:
    (documented,) = re.findall(r"^ACL SETUSER hashlens on '>PASSWORD' (.*)$", PAGE, re.MULTILINE)
    (written,) = re.findall(
        r"^user hashlens on #\S* \S* (.*)$", PAGE.replace("$(hash redis)", "x"), re.M
    )
    assert set(written.split()) - {"-@all"} == set(documented.split())


def test_the_overlay_of_step_2(tmp_path: Path) -> None:
    run(block_with("mkdir -p deploy/k8s/overlays/mine"), tmp_path)
    folder = tmp_path / "deploy" / "k8s" / "overlays" / "mine"
    written = yaml.safe_load((folder / "kustomization.yaml").read_text())
    here = ROOT / "deploy" / "k8s" / "overlays" / "mine"
    assert all((here / resource).resolve().is_dir() for resource in written["resources"])
    built = re.findall(r"docker build -f (\S+) -t (\S+):(\S+) \.", PAGE)
    assert [(image["newName"], image["newTag"]) for image in written["images"]] == [
        (name, tag) for _, name, tag in built
    ]
    assert all((ROOT / dockerfile).is_file() for dockerfile, _, _ in built)


def test_the_pod_that_restores() -> None:
    (text,) = re.findall(r"<<'END'\n(apiVersion: v1\nkind: Pod\n.*?)^END$", PAGE, re.M | re.DOTALL)
    pod = yaml.safe_load(text)
    for version in ("1.31", kubernetes_validate.latest_version()):
        kubernetes_validate.validate(pod, version, strict=True)
    search = (ROOT / "deploy" / "k8s" / "base" / "search.yaml").read_text()
    statefulset = next(o for o in yaml.safe_load_all(search) if o["kind"] == "StatefulSet")
    ours, theirs = pod["spec"], statefulset["spec"]["template"]["spec"]
    assert pod["metadata"]["labels"] == statefulset["spec"]["selector"]["matchLabels"]
    assert ours["securityContext"].items() <= theirs["securityContext"].items()
    assert ours["containers"][0]["securityContext"] == theirs["containers"][0]["securityContext"]
    mounts = {(m["name"], m["mountPath"]) for m in ours["containers"][0]["volumeMounts"]}
    assert mounts <= {(m["name"], m["mountPath"]) for m in theirs["containers"][0]["volumeMounts"]}


def test_links_within_the_page_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors
    files = {link.partition("#")[0] for link in re.findall(r"\]\(([^)#:][^):]*)\)", PAGE)}
    assert [f for f in sorted(files) if f and not (ROOT / "docs" / f).exists()] == []


def test_alerts_that_are_named_exist() -> None:
    rules = yaml.safe_load((ROOT / "deploy" / "grafana" / "alerts.yaml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    section = PAGE[PAGE.index("## What to do when") :]
    section = section[: section.index("\n## ", 3)]
    assert set(re.findall(r"`(Hashlens\w+)`", section)) == alerts


def test_nothing_is_removed_that_was_not_named() -> None:
    """`rm -r` of a variable that another shell has set would take the whole volume."""
    removals = [line for block in BLOCKS for line in block.splitlines() if "rm -r" in line]
    assert len(removals) == 2
    assert all(line.rstrip().endswith("/${day:?}") for line in removals)
    (restoring,) = [block for block in BLOCKS if "hashlens restore" in block and "exec" in block]
    lines = [line for line in restoring.splitlines() if "kubectl -n hashlens exec" in line]
    # Each only if the one before went well.
    assert "&&\nkubectl -n hashlens exec restore -- rm -r" in restoring
    assert "delete pvc" not in restoring
    assert len(lines) == 3
