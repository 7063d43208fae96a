"""What `make k8s-check` does, without the servers that it builds."""

from __future__ import annotations

import copy
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.deploy import apiserver, control_plane, manifests, walkthrough
from tests.deploy.api_client import (
    LAST_APPLIED,
    Answer,
    as_kubectl_sends,
    warnings_of,
)
from tests.deploy.custom_resources import CustomKind, custom_kinds, definition, structural
from tests.support.services import wait_until

GO_MOD = """
require (
	k8s.io/api v0.0.0
	k8s.io/utils v0.0.0-20260101000000-0123456789ab
)
replace (
	k8s.io/api => ./staging/src/k8s.io/api
	k8s.io/client-go => ./staging/src/k8s.io/client-go
	example.org/other => example.org/fork v1.0.0
)
"""

STATEFUL_SET = yaml.safe_load(
    """
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: search, namespace: hashlens}
spec:
  template:
    metadata: {labels: {app: search}}
    spec:
      containers: [{name: search, image: hashlens-search}]
  volumeClaimTemplates:
  - metadata: {name: data}
"""
)


def test_the_module_replaces_what_kubernetes_publishes_apart_and_nothing_else() -> None:
    program = control_plane.kubernetes_program("kube-apiserver", "1.30.14")
    text = control_plane.go_mod(program, control_plane.staging_modules(GO_MOD))
    assert [line for line in text.splitlines() if line.startswith(("require", "replace"))] == [
        "require k8s.io/kubernetes v1.30.14",
        "replace k8s.io/api => k8s.io/api v0.30.14",
        "replace k8s.io/client-go => k8s.io/client-go v0.30.14",
    ]
    assert "gitMinor=30" in program.ldflags


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "toolchain", "reason"),
    [
        ("go1.26.0", "local", ""),
        ("go1.27rc1", "local", ""),
        ("go2.0", "local", ""),
        ("go1.24.9", "auto", ""),
        ("go1.24.9", "go1.24.9+auto", ""),
        ("go1.24.9", "local", "needs Go 1.26, this is go1.24.9 with GOTOOLCHAIN=local"),
        ("", "local", "this is unknown"),
    ],
)
def test_an_old_go_is_a_reason_unless_it_fetches_a_newer_one(
    version: str, toolchain: str, reason: str
) -> None:
    told = control_plane.too_old(version, toolchain)
    assert reason in told
    assert bool(told) == bool(reason)


def test_without_go_the_check_says_why_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(apiserver.main, ["--folder", str(tmp_path / "logs")])
    assert result.exit_code == 0
    assert result.output == (
        "k8s-check is skipped: no Go toolchain on PATH to build an API server with\n"
    )
    assert not (tmp_path / "logs").exists()


def test_go_that_does_not_work_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script(tmp_path / "go", "echo broken >&2; exit 3")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert control_plane.why_not() == f"{tmp_path}/go does not work: broken"


def test_only_a_binary_of_the_right_version_is_taken_for_built(tmp_path: Path) -> None:
    program = control_plane.Program("etcd", "m", "3.7.0", "p")
    path = tmp_path / "etcd"
    assert not control_plane.built(program, path)
    script(path, "echo 'etcd Version: 3.7.0'")
    assert control_plane.built(program, path)
    script(path, "echo 'etcd Version: 3.7.01'")
    assert not control_plane.built(program, path)
    path.chmod(0o644)
    assert not control_plane.built(program, path)


def test_a_failed_build_ends_the_check_with_what_go_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(
        tmp_path / "go",
        '[ "$1" = env ] && { echo go1.26.1; echo local; exit; }; echo no >&2; exit 1',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(apiserver, "REPOSITORY", tmp_path)
    monkeypatch.setattr(manifests, "kustomize", lambda: ["kustomize"])
    monkeypatch.setattr(apiserver, "rendered", lambda: {"one": [STATEFUL_SET]})
    result = CliRunner().invoke(apiserver.main, ["--folder", str(tmp_path / "logs")])
    assert result.exit_code == 1
    assert "k8s-check has no server: go mod download failed:\nno" in result.output


def test_a_server_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    script(tmp_path / "etcd", "echo no disk; exit 7")
    binaries = control_plane.Binaries(*[tmp_path / "etcd"] * 3)
    with (
        pytest.raises(control_plane.ControlPlaneError, match=r"etcd ended with 7:\nno disk"),
        control_plane.ControlPlane(binaries, tmp_path),
    ):
        pass


def test_servers_are_ended_even_if_they_ignore_sigterm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script(tmp_path / "etcd", "trap '' TERM; echo 1; exec sleep 60")
    monkeypatch.setattr(control_plane, "STOP_S", 0.3)
    monkeypatch.setattr(control_plane, "READY_S", 1.0)

    def answers(*_: object) -> bool:
        # It never does, and is asked when it has come as far as it will.
        wait_until((tmp_path / "etcd.log").read_text, within_s=60, what="it says something")
        return False

    monkeypatch.setattr(control_plane, "_answers", answers)
    binaries = control_plane.Binaries(*[tmp_path / "etcd"] * 3)
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def noted(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    with (
        pytest.raises(control_plane.ControlPlaneError, match="etcd is not ready after 1 s:\n1"),
        control_plane.ControlPlane(binaries, tmp_path),
    ):
        pass
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_a_pod_is_made_as_the_controller_would() -> None:
    before = copy.deepcopy(STATEFUL_SET)
    pod = apiserver.pod_of(STATEFUL_SET)
    assert before == STATEFUL_SET
    assert pod == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "search-0", "namespace": "hashlens", "labels": {"app": "search"}},
        "spec": {
            "containers": [{"name": "search", "image": "hashlens-search"}],
            "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data-search-0"}}],
        },
    }


def test_a_cron_job_has_pods_and_a_service_or_certificate_has_none() -> None:
    inner = {"spec": {"template": STATEFUL_SET["spec"]["template"]}}
    cron = {"kind": "CronJob", "metadata": {"name": "c"}, "spec": {"jobTemplate": inner}}
    pod = apiserver.pod_of(cron)
    assert pod is not None
    assert pod["metadata"]["name"] == "c-0"
    assert apiserver.pod_of({"kind": "Service", "metadata": {"name": "s"}, "spec": {}}) is None
    assert apiserver.pod_of({"kind": "ConfigMap", "metadata": {"name": "s"}}) is None
    secret = {"kind": "Certificate", "metadata": {}, "spec": {"template": {"spec": {}}}}
    assert apiserver.pod_of(secret) is None


def test_what_the_server_dropped_is_found() -> None:
    sent = {"a": {"b": 1, "c": [{"d": 2}, {"e": 3}]}, "gone": "x", "short": [1, 2]}
    assert list(apiserver.lost(sent, copy.deepcopy(sent))) == []
    kept = {"a": {"b": "1", "c": [{"d": 2, "default": 9}, {}]}, "short": [1]}
    assert list(apiserver.lost(sent, kept)) == [".a.c[1].e", ".gone", ".short"]
    assert list(apiserver.lost({"a": [], "b": {}, "c": False}, {})) == []
    assert list(apiserver.lost({"a": {"b": 1}}, {"a": None})) == [".a"]


def test_warnings_are_read_from_their_headers() -> None:
    headers = [r'299 - "would violate \"restricted\": a, b"', '299 - "old", 299 - "older"']
    assert warnings_of(headers) == ('would violate "restricted": a, b', "old", "older")
    assert warnings_of([]) == ()


def test_a_refusal_and_a_warning_both_fail() -> None:
    outcome = apiserver.Outcome("cpu-small")
    assert outcome.check("Pod/a", Answer(201, {}))
    assert not outcome.failures
    assert outcome.check("Pod/b", Answer(200, {}, ("deprecated",)))
    assert not outcome.check("Pod/c", Answer(422, {"message": "unknown field"}))
    assert outcome.failures == ["Pod/b: the server warns: deprecated", "Pod/c: unknown field"]
    good = apiserver.Outcome("gpu", n_objects=31, n_custom=2, n_pods=3, took_s=1.25)
    assert apiserver.table([outcome, good]).splitlines() == [
        "combination  objects  custom  pods  seconds  result",
        "cpu-small          0       0     0      0.0  2 failures",
        "gpu               31       2     3      1.2  ok",
    ]


def test_what_kubectl_sends_holds_the_object_twice() -> None:
    sent = as_kubectl_sends(STATEFUL_SET)
    assert LAST_APPLIED not in STATEFUL_SET["metadata"].get("annotations", {})
    assert yaml.safe_load(sent["metadata"]["annotations"][LAST_APPLIED]) == STATEFUL_SET


def test_kinds_of_operators_are_told_from_those_of_kubernetes() -> None:
    monitor = {"apiVersion": "monitoring.coreos.com/v1", "kind": "PodMonitor"}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    service = {"apiVersion": "v1", "kind": "Service"}
    kinds = custom_kinds([monitor, policy, service, monitor])
    assert kinds == [CustomKind("monitoring.coreos.com", "v1", "PodMonitor")]
    assert kinds[0].plural == "podmonitors"


def test_a_definition_keeps_the_fields_of_the_schema(tmp_path: Path) -> None:
    (tmp_path / "podmonitor.monitoring.coreos.com_v1.json").write_text(
        """{"type": "object", "additionalProperties": false, "required": ["spec"], "properties":
        {"apiVersion": {"type": "string"}, "spec": {"type": ["object", "null"],
        "additionalProperties": false, "properties": {"port": {"oneOf":
        [{"type": "string"}, {"type": "integer"}], "x-kubernetes-int-or-string": true}}}}}"""
    )
    made = definition(CustomKind("monitoring.coreos.com", "v1", "PodMonitor"), tmp_path)
    assert made["metadata"]["name"] == "podmonitors.monitoring.coreos.com"
    assert made["spec"]["versions"][0]["schema"]["openAPIV3Schema"] == {
        "type": "object",
        "required": ["spec"],
        "properties": {
            "spec": {
                "type": "object",
                "properties": {"port": {"x-kubernetes-int-or-string": True}},
            }
        },
    }


@pytest.mark.parametrize(
    ("schema", "made"),
    [
        ({"type": ["string", "null"]}, {"type": "string"}),
        ({"type": ["integer", "string"]}, {"x-kubernetes-int-or-string": True}),
        ({"type": "object"}, {"type": "object", "x-kubernetes-preserve-unknown-fields": True}),
        ({}, {"x-kubernetes-preserve-unknown-fields": True}),
        (
            {"type": "array", "items": {"type": "string", "description": "d"}},
            {"type": "array", "items": {"type": "string"}},
        ),
        (
            {"additionalProperties": {"type": "string"}},
            {"type": "object", "additionalProperties": {"type": "string"}},
        ),
    ],
)
def test_schemas_become_structural(schema: object, made: object) -> None:
    assert structural(schema) == made


PAGE = """
```bash
kubectl create secret generic a
echo made > secret
```
```bash
kubectl apply -k deploy/k8s/overlays/small
kubectl wait forever
```
"""


@pytest.mark.parametrize(
    ("refuses", "failures"),
    [("none", []), ("diff", ["kubectl diff -k deploy/k8s/overlays/small: +differs"])],
)
def test_what_a_page_says_is_typed(tmp_path: Path, refuses: str, failures: list[str]) -> None:
    folder = tmp_path / "deploy" / "k8s"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(PAGE)
    log = tmp_path / "log"
    says = (
        f'test -r "$KUBECONFIG" && echo "$@" >>{log}; [ $1 = {refuses} ] && echo +differs && exit 1'
    )
    script(tmp_path / "kubectl", f"{says}; exit 0")
    server = control_plane.ControlPlane(control_plane.Binaries(*[tmp_path] * 3), tmp_path)
    assert walkthrough.walk(server, tmp_path / "kubectl", folder) == failures
    server.stop()
    assert log.read_text().splitlines() == [
        "create secret generic a",
        "apply -k deploy/k8s/overlays/small",
        "diff -k deploy/k8s/overlays/small",
    ]


def test_the_pages_have_commands() -> None:
    typed = walkthrough.commands()
    assert "kubectl apply -k deploy/k8s/overlays/cpu-small" in typed
    assert "kubectl diff -k deploy/k8s/overlays/cpu-small" in typed
    assert any("create secret generic redis-acl" in each for each in typed)
