"""The pages of deploy/k8s say what there is, and copies are copies."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from hashlens.rpc import tokens
from tests.deploy.k8s_policies import config
from tests.deploy.k8s_readme import blocks, secrets
from tests.deploy.k8s_server import container_of
from tests.deploy.manifests import (
    BASE,
    K8S,
    ROOT,
    Cluster,
    Combination,
    components,
    kustomize,
    overlays,
    render,
)

GRAFANA = ROOT / "deploy" / "grafana"
README = (K8S / "README.md").read_text()


def test_alerts_and_dashboard_are_those_of_grafana() -> None:
    cluster = Cluster(render(Combination(BASE, ("monitoring",))))
    rule = cluster.get("PrometheusRule", "hashlens")
    board = cluster.get("ConfigMap", "hashlens-dashboard")
    assert rule is not None
    assert board is not None
    assert rule["spec"] == yaml.safe_load((GRAFANA / "alerts.yaml").read_text())
    assert board["data"] == {"hashlens.json": (GRAFANA / "hashlens.json").read_text()}
    assert json.loads(board["data"]["hashlens.json"])["panels"]


def test_each_component_and_overlay_has_its_line_and_each_component_its_page() -> None:
    for name in components():
        page = K8S / "components" / name / "README.md"
        assert page.read_text().startswith(f"# {name}\n"), page
        assert f"(components/{name})" in README, name
    for path in overlays():
        assert f"| `{path.name}` |" in README, path.name


@pytest.mark.parametrize("directory", overlays(), ids=lambda path: path.name)
def test_kubectl_renders_what_kustomize_does(directory: Path) -> None:
    kubectl, command = shutil.which("kubectl"), kustomize()
    if kubectl is None or command is None or command[0] == kubectl:
        pytest.skip("kubectl and kustomize are not both installed")
    done = subprocess.run(
        [kubectl, "kustomize", str(directory)], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert list(yaml.safe_load_all(done.stdout)) == render(directory)


def test_links_lead_somewhere() -> None:
    pages = [*K8S.glob("README.md"), *K8S.glob("*/README.md"), *K8S.glob("components/*/README.md")]
    assert len(pages) > 8
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


def test_commands_make_secrets_and_none_is_in_the_manifests() -> None:
    assert len(blocks(K8S / "README.md")) == 1
    made = secrets()
    assert {"tokens", "search-credentials", "redis-acl"} <= set(made)
    for values in made.values():
        for value in values.values():
            assert value.strip()
    stored = made["tokens"]["tokens"] + made["redis-acl"]["users.acl"]
    for token in made["search-credentials"].values():
        assert len(token) == 64
        assert token not in stored


def test_tokens_are_accepted_for_what_they_are_for(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(secrets()["tokens"]["tokens"])
    accepted = tokens.Tokens(path)
    for key, scope in (("encoder-token", "read"), ("peer-token", "admin")):
        token = secrets()["search-credentials"][key]
        found = accepted.find(token)
        assert found is not None
        assert found.scope.name.lower() == scope


@pytest.mark.parametrize("server", ["encoder", "search", "redis"])
def test_certificates_have_the_names_that_are_called(server: str, tmp_path: Path) -> None:
    cluster = Cluster(render(Combination(BASE, ("tls",))), secrets())
    told = config(cluster, container_of(cluster, "search"))
    called = {
        "encoder": [told.encoder.partition(":")[0], "encoder.hashlens", "localhost"],
        "search": [told.advertise.partition(":")[0], "search.hashlens", "localhost"],
        "redis": ["redis"],
    }[server]
    for name, text in secrets()[f"{server}-tls"].items():
        (tmp_path / name).write_text(text)
    ca, certificate = tmp_path / "ca.crt", tmp_path / "tls.crt"
    for host, status in (*((host, 0) for host in called), ("elsewhere", 2)):
        done = subprocess.run(
            ["openssl", "verify", "-verify_hostname", host, "-CAfile", ca, certificate],
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert done.returncode == status, (host, done.stderr)


def test_cert_manager_and_the_commands_give_the_same_names() -> None:
    cluster = Cluster(render(Combination(BASE, ("tls", "cert-manager"))))
    text = (K8S / "components" / "tls" / "README.md").read_text()
    for name in ("encoder", "search", "redis", "client"):
        told = re.search(rf"^make_certificate {name} (.*)$", text, re.M)
        certificate = cluster.get("Certificate", f"{name}-tls")
        assert told is not None
        assert certificate is not None
        assert [f"DNS:{host}" for host in certificate["spec"]["dnsNames"]] == told[1].split(",")
